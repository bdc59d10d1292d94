"""One meaning of a request: every op and module runs on the backends asked for, or raises `BackendError`.

What runs is seen at the compiled module, in whose place a counter stands, with Triton and CUDA made unavailable.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from lanes import Lane
from test_inference import arguments, layer, run
from test_plain_modules import FRAMES, _layer, _stream, ours

from zipformer_kernels import BackendError, ops, training, use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.core.op import Op
from zipformer_kernels.modules import (
    BiasNorm,
    BypassModule,
    Conv2dSubsampling,
    ConvNeXt,
    ConvolutionModule,
    FeedforwardModule,
    NonlinAttention,
    SelfAttention,
    SwooshL,
    SwooshR,
)
from zipformer_kernels.ops.attention import AttentionWeights
from zipformer_kernels.optim import ScaledAdam

pytestmark = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}")

OPS = [full for name in ops.names() for full in (name, *ops.variant_names(name)) if isinstance(ops.get(full), Op)]
OPS = [name for name in OPS if "cpu" in ops.get(name).backends]  # scales of bypasses have kernels for GPUs alone
REASON = "a test made it unavailable"


class Counter:
    """Stands in for the compiled module, and counts the calls of its CPU kernels."""

    def __init__(self, native):
        self.native, self.calls = native, 0

    def __getattr__(self, name):
        self.calls += name.endswith("_cpu")
        return getattr(self.native, name)


@pytest.fixture
def kernels(monkeypatch):
    """The counter; of the backends that run here, ``eager`` and ``cpu`` are left."""
    counter = Counter(backend.native)
    monkeypatch.setattr(backend, "native", counter)
    for name in ("triton", "cuda"):
        monkeypatch.setitem(backend.missing, name, REASON)
    return counter


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


def backward(results):
    """A backward pass, where there is a graph."""
    loss = sum(y.sum() for y in ([results] if torch.is_tensor(results) else results) if y.is_floating_point())
    if loss.requires_grad:
        loss.backward()


# ---- what is asked for something: each makes a call, and what it is called on ----


def called(name):
    args = ops.example(name)
    return lambda: ops.get(name)(*args)


def module_of(made, *inputs):
    module = made.eval()
    return lambda: module(*inputs)


def on_weights(made, heads):
    """A module on attention weights, which are asked for the same."""
    q, k, p, e, x = leaf(9, 2, heads, 4), leaf(9, 2, heads, 4), leaf(9, 2, heads, 3), leaf(17, heads, 3), leaf(9, 2, 24)
    module = made.eval()
    return lambda: module(x, AttentionWeights(q, k, p, e))


def offline(causal):
    module, (x, *rest) = layer(torch.float32, causal), arguments(torch.float32)
    return lambda: run(module, x.requires_grad_(), *rest, causal)


def stream():
    module = _layer(ours, True).double().eval()
    return lambda: _stream("causal layer", module, torch.randn(FRAMES, 2, 12).double())


def step():
    parameter = torch.nn.Parameter(torch.randn(20, 5))
    parameter.grad = torch.randn(20, 5)
    return lambda: ScaledAdam([parameter]).step() or parameter.detach()


CALLS = {
    **{name: (lambda name=name: called(name)) for name in OPS},
    "scaled_adam": step,
    "SwooshL": lambda: module_of(SwooshL(), leaf(5, 3, 8)),
    "SwooshR": lambda: module_of(SwooshR(), leaf(5, 3, 8)),
    "BypassModule": lambda: module_of(BypassModule(8), leaf(5, 3, 8), leaf(5, 3, 8)),
    "BiasNorm": lambda: module_of(BiasNorm(8), leaf(5, 3, 8)),
    "BiasNorm, channels second": lambda: module_of(BiasNorm(8, channel_dim=1), leaf(5, 8, 3)),
    "ConvolutionModule": lambda: module_of(ConvolutionModule(8, 5, causal=False), leaf(9, 2, 8)),
    "ConvolutionModule, causal": lambda: module_of(ConvolutionModule(8, 5, causal=True), leaf(9, 2, 8), None, 4),
    "FeedforwardModule": lambda: module_of(FeedforwardModule(8, 12, 0.1), leaf(9, 2, 8)),
    "SelfAttention": lambda: on_weights(SelfAttention(24, 2, 6), 2),
    "NonlinAttention": lambda: on_weights(NonlinAttention(24, 12), 1),
    "ConvNeXt": lambda: module_of(ConvNeXt(6), leaf(2, 6, 9, 5)),
    "ConvNeXt, channels last": lambda: module_of(
        ConvNeXt(6), leaf(2, 6, 9, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    ),
    "Conv2dSubsampling": lambda: module_of(Conv2dSubsampling(11, 8, 2, 3, 4), leaf(2, 25, 11), torch.tensor([25, 22])),
    "layer": lambda: offline(False),
    "layer, causal": lambda: offline(True),
    "layer, stream": stream,
}
ONLY_IN_BACKWARD = {
    "Balancer": lambda: module_of(training.Balancer(8, -1, prob=1.0), leaf(9, 2, 8) * 3),
    "Balancer, channels second": lambda: module_of(training.Balancer(8, 1, prob=1.0), leaf(9, 8, 2) * 3),
}
WITH_GRADIENTS = [name for name in CALLS if name not in OPS or ops.get(name).saved] + [*ONLY_IN_BACKWARD]
MODES = [
    *((name, False) for name in CALLS if name not in WITH_GRADIENTS or name not in ONLY_IN_BACKWARD),
    *((name, True) for name in WITH_GRADIENTS),
]
every_call = pytest.mark.parametrize(
    ("name", "gradients"), [pytest.param(*mode, id=f"{mode[0]}-{'gradients' if mode[1] else 'none'}") for mode in MODES]
)


def call(name, gradients, request):
    """Makes a call with a request, and its backward pass without one, which goes where the forward pass went."""
    random.seed(0)
    torch.manual_seed(0)
    prepared = (CALLS | ONLY_IN_BACKWARD)[name]()
    with torch.set_grad_enabled(gradients):
        with use_backend(request):
            results = prepared()
        backward(results)


@every_call
@pytest.mark.parametrize("request_", ["cpu", "cuda,cpu", "triton,cuda,cpu,eager", "auto"])
def test_kernels_run_where_they_are_asked_for(name, gradients, request_, kernels):
    call(name, gradients, request_)
    of_torch = name == "depthwise_conv2d" and not gradients  # forward is torch's convolution on every backend
    if request_ != "auto" and not of_torch:  # auto may hold torch's own functions for faster
        assert kernels.calls > 0


@every_call
@pytest.mark.parametrize("request_", ["eager", "triton,eager", "eager,cpu"])
def test_no_kernel_runs_where_eager_is_asked_for(name, gradients, request_, kernels):
    call(name, gradients, request_)
    assert kernels.calls == 0


@every_call
@pytest.mark.parametrize("request_", ["triton", "cuda", "triton,cuda"])
def test_what_is_unavailable_raises(name, gradients, request_, kernels):
    with pytest.raises(BackendError, match=f"backend '{request_.split(',')[0]}' cannot serve this call: {REASON}"):
        call(name, gradients, request_)
    assert kernels.calls == 0


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("request_", ["cpu", "eager", "triton"])
def test_whitening_is_of_torch_alone(request_, gradients, kernels):
    """It has no kernels, and so nothing to ask for."""
    module = training.Whiten(1, 1.0, prob=1.0, grad_scale=0.1)
    with torch.set_grad_enabled(gradients), use_backend(request_):
        backward(module(leaf(9, 2, 8) * 1.0))
    assert kernels.calls == 0


@pytest.mark.parametrize("name", OPS)
def test_an_argument_asks_for_the_same(name, kernels):
    op, args = ops.get(name), ops.example(name)
    for request in ("cpu", "cuda,cpu"):
        assert op.select(request, *args) == "cpu"
    for request in ("eager", "triton,eager"):
        assert op.select(request, *args) == "eager"
    op(*args, backend="eager")
    assert kernels.calls == 0
    backward(op(*args, backend="cuda,cpu"))
    assert kernels.calls > 0
    with use_backend("eager"), pytest.raises(BackendError, match=f"{op.name}: backend 'triton' cannot .* {REASON}"):
        op(*args, backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="inputs are on the CPU, where a GPU's backends take none")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["Conv2dSubsampling", "layer", "layer, causal", "SelfAttention", "ConvolutionModule"])
@pytest.mark.parametrize("lane", [Lane("triton"), Lane("cuda")], ids=lambda lane: lane.backend)
def test_a_module_runs_by_the_name_of_a_backend_of_gpus(lane, name, gradients):
    """With gradients and without; what it has no kernels for runs on the next."""
    with lane.active():
        call(name, gradients, lane.backend)


# ---- backends that some ops have kernels on, and others have not ----


@pytest.fixture
def mine():
    """A backend on which only swoosh has kernels, and only for float64; auto would choose it first."""
    backend.register(backend.Backend("mine", lambda: ("cpu",), lambda: None, {"cpu": 50}))
    swoosh = ops.get("swoosh")
    eager = swoosh.backends["eager"]
    launchers = SimpleNamespace(
        supports=lambda x, kind: None if x.dtype == torch.float64 else "it takes float64",
        worthwhile=lambda *_: True,
        forward=eager.forward,
        backward=eager.backward,
        variants={},
    )
    swoosh.add_backend("mine", launchers)
    yield "mine"
    del swoosh.backends["mine"]
    backend.unregister("mine")


@pytest.mark.parametrize("name", OPS)
def test_an_op_without_kernels_runs_on_the_next_in_preference(name, mine):
    op, args = ops.get(name), ops.example(name)
    with pytest.raises(BackendError, match=f"{op.name}: backend 'mine' cannot serve this call"):
        op.select(mine, *args)
    with use_backend(mine):
        if name == "swoosh":  # it has kernels, but none for this call
            with pytest.raises(BackendError, match="it takes float64"):
                op.select(None, *args)
        else:
            assert op.select(None, *args) == "cpu"
    with use_backend("mine,eager"):
        assert op.select(None, *args) == "eager"


def test_an_optimizer_without_kernels_steps_on_the_next_in_preference(mine, kernels):
    call("scaled_adam", False, mine)
    assert kernels.calls > 0


@pytest.mark.parametrize("gradients", [False, True])
def test_ways_for_whole_modules_pass_over_no_backend(mine, gradients, kernels):
    """Whether it is asked for, or chosen by ``auto``."""
    called, swoosh = [], ops.get("swoosh")
    forward = swoosh.backends["eager"].forward
    swoosh.backends[mine].forward = lambda *args: called.append(args) or forward(*args)
    with pytest.raises(BackendError, match="it takes float64"):
        call("Conv2dSubsampling", gradients, mine)
    module, x = Conv2dSubsampling(11, 8, 2, 3, 4).double().eval(), torch.randn(2, 25, 11).double()
    for request in (mine, "auto"):
        with torch.set_grad_enabled(gradients):
            with use_backend(request):
                results = module(x.requires_grad_(gradients), torch.tensor([25, 22]))
            backward(results)
            assert called
            called.clear()
            kernels.calls = 0
            call("layer", gradients, request)
            assert kernels.calls > 0
