"""What is special to shared-weight attention: its penalty, for `contract` too, any shape and mask, memory."""

import pytest
import torch
from contract import TOLERANCE, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import lanes
from unseen import unseen

from zipformer_kernels.core import backend, tuning
from zipformer_kernels.ops import attention
from zipformer_kernels.ops.attention import AttentionWeights, ChunkMask
from zipformer_kernels.ops.attention.cases import CASES, padding, weights_inputs
from zipformer_kernels.ops.nonlin_attention import nonlin_attention

OP = attention._op


def storing(stored):
    """A handle stores weights whatever their size, where the backend can, or computes them again at every use."""
    return tuning.override(
        **{"attention.stored_bytes": 1 << 40 if stored else 0, "attention.stored_share": 1000 if stored else 0}
    )


both_ways = pytest.mark.parametrize("stored", [True, False], ids=["stored", "recomputed"])


def exact(args, grad):
    """Output and gradients in float64, from the differentiable reference."""
    wide = [x.detach().double().cpu() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    wide = [x.cpu() if isinstance(x, torch.Tensor) else x for x in wide]
    leaves = [x.requires_grad_() for x in wide[:5]]
    out = attention.reference.attention(*wide)
    grads = list(torch.autograd.grad(out, leaves, grad.double().cpu()))
    *_, penalty, limit = args
    if penalty:
        scores = attention.reference.scores(*leaves[:4])
        loss = penalty * (scores.abs() - limit).relu().sum()
        for i, extra in enumerate(torch.autograd.grad(loss, leaves[:4])):
            grads[i] = grads[i] + extra
    return out, grads


def assert_matches(args, out, grad, grads, backend=None):
    check(args, out, grad, grads, TOLERANCE[args[4].dtype])


def check(args, out, grad, grads, tolerance):
    expected, expected_grads = exact(args, grad)
    assert out.dtype == args[4].dtype
    assert relative(out, expected) < tolerance
    floor = 0.1 * grad.double().norm().item()  # a single source leaves scores without a gradient: only rounding
    for i, actual in grads.items() if isinstance(grads, dict) else enumerate(grads):
        assert actual.dtype == args[i].dtype
        assert relative(actual, expected_grads[i], floor) < 3 * tolerance, "qkpev"[i]


@settings(max_examples=15)
@given(
    targets=st.integers(1, 40),
    left=st.integers(0, 40),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    channels=st.integers(1, 40),
    padded=st.booleans(),
    masked=st.booleans(),
    stored=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(OP))
def test_any_shape_and_mask(lane, targets, left, batch, heads, channels, padded, masked, stored, seed):
    torch.manual_seed(seed)
    sources = targets + left
    q, k = torch.randn(targets, batch, heads, 16) / 4, torch.randn(sources, batch, heads, 16)
    p, e = torch.randn(targets, batch, heads, 4), torch.randn(targets + sources - 1, heads, 4)
    values = torch.randn(sources, batch, heads * channels)
    padding = torch.rand(batch, sources) > 0.5 if padded else None
    mask = torch.rand(targets, sources) > 0.5 if masked else None
    leaves = [x.to(lane.device).requires_grad_() for x in (q, k, p, e, values)]
    masks = [None if m is None else m.to(lane.device) for m in (padding, mask)]
    with lane.active(), storing(stored):
        out = AttentionWeights(*leaves[:4], *masks).aggregate(leaves[4])
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad)
    v = values.unflatten(2, (heads, channels))
    args = (q, k, p, e, v, None, padding, mask, -1, -1, 0.0, 0.0)
    expected, expected_grads = exact(args, grad.unflatten(2, (heads, channels)))
    assert relative(out, expected.flatten(2)) < TOLERANCE[torch.float32]
    floor = 0.1 * grad.double().norm().item()
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert relative(actual, wanted.reshape(actual.shape), floor) < 3 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("lane", lanes(OP, "eager"))
def test_results_repeat_bit_for_bit(lane):
    with lane.active():
        args = CASES[0].inputs(torch.float32, lane.device)
        runs = []
        for _ in range(2):
            out = OP(*args)
            runs.append([out, *torch.autograd.grad(out.sum(), args[:5])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@both_ways
@pytest.mark.parametrize("lane", lanes(OP))
def test_compiles_without_graph_breaks(lane, stored):
    def layer(q, k, values):
        weights = AttentionWeights(q, k, attn_mask=ChunkMask(4, 1))
        return weights.aggregate(values) + weights[0:1].aggregate(values)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(12, 2, 2, 8), torch.randn(12, 2, 2, 8), torch.randn(12, 2, 6)]
    inputs = [x.to(lane.device).requires_grad_() for x in inputs]
    with lane.active(), storing(stored):
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        expected = torch.autograd.grad(layer(*inputs).square().sum(), inputs)
    for actual, wanted in zip(got, expected, strict=True):
        assert relative(actual, wanted) < 3 * TOLERANCE[torch.float32]


@pytest.mark.usefixtures("isa")
def test_every_instruction_set_agrees():
    """On sizes that end tiles, registers and blocks of rows in every way; narrow and wide values."""
    for dtype in TOLERANCE:
        for targets, sources, channels in ((1, 1, 1), (45, 400, 12), (33, 767, 61), (64, 385, 16)):
            torch.manual_seed(0)
            q, k, p, e = weights_inputs(targets, sources, 2, 2, 19, 5, dtype, "cpu")
            v = torch.randn(sources, 2, 2, channels).to(dtype).requires_grad_()
            masks = padding(2, sources, "cpu"), None, -1, -1
            with backend.use_backend("cpu"):
                softmax = attention._op.variants["softmax"](*(x.detach() for x in (q, k, p, e)), *masks)
                args = [q, k, p, e, v, softmax, *masks, 0.01, 2.0]
                out = OP(*args)
                grad = torch.randn_like(out)
                grads = torch.autograd.grad(out, args[:5], grad)
            check(args, out, grad, grads, TOLERANCE[dtype])


@pytest.mark.parametrize("lane", lanes(OP, "triton", "cuda"))
def test_long_chunked_sequences(lane):
    """Whole tiles are out of a target's sight, and some targets see only padding, so that all count for them."""
    torch.manual_seed(7)
    frames, rule = 900, ChunkMask(50, 1)
    q, k = (torch.randn(frames, 2, 2, 8, requires_grad=True) for _ in range(2))
    p, e = torch.randn(frames, 2, 2, 4), torch.randn(2 * frames - 1, 2, 4)
    v = torch.randn(frames, 2, 2, 6)
    hidden = torch.zeros(2, frames, dtype=torch.bool)
    hidden[1, 200:450] = True
    masks = hidden, None, rule.chunk, rule.left_chunks
    with lane.active():
        softmax = attention._op.variants["softmax"](q.detach(), k.detach(), p, e, *masks)
        blind = softmax[0, 1, :, 0] == attention.reference.MASKED_SCORE
        assert torch.equal(blind.nonzero()[:, 0], torch.arange(250, 450))
        args = [x.requires_grad_() for x in (q, k, p, e, v)] + [softmax, *masks, 0.0, 0.0]
        out = OP(*args)
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, args[:5], grad)
    check(args, out, grad, grads, TOLERANCE[torch.float32])


@pytest.mark.parametrize("size", [0.1, 3.0], ids=["even", "sharp"])
@pytest.mark.parametrize("lane", lanes(OP, "eager"))
def test_weights_computed_again_are_as_exact_as_eagers(lane, size):
    """In float32, against float64: what all weights of a target share is rounded no more coarsely than they are."""
    stand_ins = {"triton": 60, "cuda": 300}
    frames = stand_ins.get(lane.backend, 1500) if lane.device.type == "cpu" else 1500
    torch.manual_seed(11)
    q, k = size / 3 * torch.randn(frames, 1, 1, 32), torch.randn(frames, 1, 1, 32)
    p, e = size * torch.randn(frames, 1, 1, 4), torch.randn(2 * frames - 1, 1, 4)
    tensors = q, k, p, e, torch.randn(frames, 1, 12)
    grad = torch.randn(frames, 1, 12)

    def run(dtype, device="cpu", name="eager"):
        leaves = [x.to(device, dtype).requires_grad_() for x in tensors]
        out = AttentionWeights(*leaves[:4], backend=name).aggregate(leaves[4])
        return out, *torch.autograd.grad(out, leaves, grad.to(out))

    with lane.active(), storing(False):
        ours = run(torch.float32, lane.device, lane.backend)
    expected, eager = run(torch.float64), run(torch.float32)
    for name, actual, other, wanted in zip(("out", *"qkpev"), ours, eager, expected, strict=True):
        # At most 1.1 times on any instruction set, and 1.4 where compilers optimise less and sums run in another order.
        # With one rounded log-sum-exp, `out` was 2.2 to 7.8 times off.
        assert relative(actual, wanted) <= 2 * relative(other, wanted), name


@pytest.mark.parametrize("lane", lanes(OP))
def test_any_strides(lane):
    """Every second channel, frame or byte of larger tensors, in an order of dimensions of their own."""
    torch.manual_seed(10)
    shapes = [(4, 40, 2, 32), (4, 40, 2, 32), (4, 40, 2, 8), (4, 79, 8), (4, 40, 2, 16)]
    whole = [torch.randn(shape, device=lane.device) for shape in shapes]
    halves = [x[:2].transpose(0, 1).transpose(1, -2 if x.ndim == 4 else 1)[..., ::2] for x in whole]
    leaves = [x.detach().requires_grad_() for x in halves]
    padding = torch.rand(2, 80, device=lane.device)[:, ::2] > 0.7
    mask = torch.rand(40, 80, device=lane.device)[:, ::2] > 0.9
    with lane.active():
        softmax = attention._op.variants["softmax"](*(x.detach() for x in leaves[:4]), padding, mask, -1, -1)
        args = [*leaves, softmax, padding, mask, -1, -1, 0.0, 0.0]
        out = OP(*args)
        grad = torch.randn(1, device=lane.device).expand(out.shape)
        grads = torch.autograd.grad(out, leaves, grad)
    check(args, out, grad, grads, TOLERANCE[torch.float32])


@both_ways
@pytest.mark.parametrize("lane", lanes(OP, "triton", "cuda"))
def test_projections_for_each_sequence(lane, stored):
    torch.manual_seed(8)
    shapes = [(30, 2, 3, 8), (30, 2, 3, 8), (30, 2, 3, 4), (2, 59, 3, 4)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    values = torch.randn(30, 2, 15, requires_grad=True)
    with lane.active(), storing(stored):
        out = AttentionWeights(*leaves).aggregate(values)
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, [*leaves, values], grad)
    args = [*leaves, values.detach().unflatten(2, (3, 5)), None, None, None, -1, -1, 0.0, 0.0]
    expected, expected_grads = exact(args, grad.unflatten(2, (3, 5)))
    for actual, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert relative(actual, wanted.reshape(actual.shape)) < 3 * TOLERANCE[torch.float32]


def test_results_do_not_depend_on_the_threads():
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    threads, runs = torch.get_num_threads(), []
    try:
        with backend.use_backend("cpu"):
            torch.manual_seed(9)
            q, k, p, e = weights_inputs(300, 300, 2, 2, 16, 4, torch.float32, "cpu")
            v = torch.randn(300, 2, 2, 12, requires_grad=True)
            softmax = attention._op.variants["softmax"](*(x.detach() for x in (q, k, p, e)), None, None, -1, -1)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                out = OP(q, k, p, e, v, softmax, None, None, -1, -1, 0.0, 0.0)
                runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, p, e, v))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_auto_takes_the_kernels_where_they_pay():
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    with backend.use_backend("auto"):
        chosen = [AttentionWeights(x, x).backend for x in (torch.randn(n, 1, 1, 4) for n in (5, 400))]
    assert chosen == ["eager", "cpu"]


@pytest.mark.skipif(backend.missing["cpu"] is not None, reason=str(backend.missing["cpu"]))
def test_mixed_dtypes_are_refused():
    q, v = torch.randn(5, 1, 1, 4), torch.randn(5, 1, 4)
    with backend.use_backend("cpu"):
        with pytest.raises(backend.BackendError, match="tensors of one dtype"):
            AttentionWeights(q, q.double())
        with storing(False), pytest.raises(backend.BackendError, match="tensors of one dtype"):
            AttentionWeights(q, q).aggregate(v.double())


def allocations(function):
    """Runs a function; returns the elements of the largest tensor that any torch operation returned."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            results = operation(*args, **(kwargs or {}))
            for x in tree_leaves(results):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // max(1, x.element_size()))
            return results

    with unseen(Largest()) as mode:
        function()
    return mode.elements


@pytest.mark.parametrize("lane", lanes(OP, "eager"))
def test_no_tensor_grows_with_the_square_of_the_frames(lane, monkeypatch):
    """At T = 16384, forward and backward of a layer's uses; at half of it where the kernels really run on the CPU.

    Triton's backward has scores' gradients of as few targets at a time as it can: else of so many as a constant number
    of bytes has room for. The interpreter's and the emulator's kernels allocate nothing and are skipped.
    """
    frames, heads = 8192 if lane.backend == "cpu" else 16384, 4
    torch.manual_seed(6)
    with lane.active():
        if lane.device.type == "cpu" and lane.backend == "triton":
            from triton.runtime.interpreter import GridExecutor

            monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)
        if lane.device.type == "cpu" and lane.backend == "cuda":
            for module in (attention.cuda, attention.cuda_gradients):
                monkeypatch.setattr(module, "call_cuda", lambda *args, **kwargs: None)
        shapes = [
            (frames, 1, heads, 32),
            (frames, 1, heads, 32),
            (frames, 1, heads, 4),
            (2 * frames - 1, heads, 4),
        ]
        leaves = [torch.randn(shape, device=lane.device, requires_grad=True) for shape in shapes]
        values = torch.randn(frames, 1, heads * 12, device=lane.device, requires_grad=True)
        thirds = [torch.randn(frames, 1, 20, device=lane.device, requires_grad=True) for _ in range(3)]

        def step():
            weights = AttentionWeights(*leaves, penalty=0.1, limit=1.0)
            outs = nonlin_attention(weights[0:1], *thirds), weights.aggregate(values), weights.aggregate(values)
            torch.autograd.grad([out.sum() for out in outs], [*leaves, values, *thirds])

        with tuning.override(**{"attention.triton_scratch_bytes": 0}):
            largest = allocations(step)
    assert largest < 2 * frames * heads * 64
    assert largest < frames**2 // 16


def test_bad_input_is_named():
    q, k = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3, 8)
    with pytest.raises(ValueError, match="k must be of shape"):
        AttentionWeights(q, k[:, :1])
    with pytest.raises(ValueError, match="p and e must be given together"):
        AttentionWeights(q, k, p=q)
    with pytest.raises(ValueError, match="e must be of shape"):
        AttentionWeights(q, k, q, torch.randn(5, 3, 8))
    with pytest.raises(TypeError, match="key_padding_mask must be a tensor of bools or integers"):
        AttentionWeights(q, k, key_padding_mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="attn_mask must be of shape"):
        AttentionWeights(q, k, attn_mask=torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="a ChunkMask needs as many sources"):
        AttentionWeights(q, torch.randn(7, 2, 3, 8), attn_mask=ChunkMask(4))
    with pytest.raises(ValueError, match="values must be"):
        AttentionWeights(q, k).aggregate(torch.randn(5, 2, 7))
    with pytest.raises(TypeError, match="attention weights cannot be changed in place"):
        AttentionWeights(q, k).mul_(2)
