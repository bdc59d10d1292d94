"""Inference leaves out what only gradients or onlookers need: same results, and whoever looks on sees everything."""

import itertools

import pytest
import torch
from lanes import lanes
from tolerances import PARITY, assert_agrees

from zipformer_kernels import use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.modules import FeedforwardModule, ZipformerEncoderLayer
from zipformer_kernels.modules.stack import DownsampledZipformerEncoder, ZipformerEncoder
from zipformer_kernels.ops import swoosh
from zipformer_kernels.ops.attention import ChunkMask

SIZES = {
    "embed_dim": 24,
    "pos_dim": 8,
    "num_heads": 2,
    "query_head_dim": 8,
    "pos_head_dim": 4,
    "value_head_dim": 6,
    "feedforward_dim": 32,
}


def layer(dtype=torch.float64, causal=False):
    torch.manual_seed(0)
    made = ZipformerEncoderLayer(**SIZES, cnn_module_kernel=5, causal=causal).to(dtype).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def arguments(dtype=torch.float64, frames=11, batch=3):
    torch.manual_seed(1)
    x = torch.randn(frames, batch, SIZES["embed_dim"], dtype=dtype)
    position = torch.randn(1, 2 * frames - 1, SIZES["pos_dim"], dtype=dtype)
    padding = torch.arange(frames) >= torch.tensor([[frames], [frames - 4], [frames - 1]])[:batch]
    return x, position, padding


def run(module, x, position, padding, causal=False):
    rule = {"chunk_size": 4, "attn_mask": ChunkMask(4, 1)} if causal else {}
    return module(x, position, src_key_padding_mask=padding, **rule)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_same_results_as_with_gradients(name, dtype, causal):
    module, args = layer(dtype, causal), arguments(dtype)
    before = [x.clone() for x in args]
    with use_backend(name):
        expected = run(module, *args, causal)
        assert expected.requires_grad
        with torch.no_grad():
            actual = run(module, *args, causal)
    torch.testing.assert_close(
        actual, expected.detach(), rtol=50 * torch.finfo(dtype).eps, atol=50 * torch.finfo(dtype).eps
    )
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


def test_views_and_single_frames():
    module = layer()
    x, position, padding = arguments(frames=8)
    for view in (x[::2], x.transpose(0, 1).contiguous().transpose(0, 1)[:4], x[:1]):
        frames = view.shape[0]
        args = view, position[:, : 2 * frames - 1], padding[:, :frames]
        with torch.no_grad():
            actual = run(module, *args)
        assert_agrees(actual, run(module, *args).detach(), PARITY[actual.dtype])


@pytest.mark.parametrize("frames", [1, 3, 4, 8, 11])
def test_a_stack_at_a_lower_frame_rate(frames):
    torch.manual_seed(2)
    stack = ZipformerEncoder(layer(), 1, pos_dim=SIZES["pos_dim"], dropout=0.0, warmup_begin=0.0, warmup_end=1.0)
    module = DownsampledZipformerEncoder(stack, SIZES["embed_dim"], 4, 0.0, False).double().eval()
    module.out_combiner.bypass_scale.data.uniform_()
    x = torch.randn(frames, 2, SIZES["embed_dim"] + 6, dtype=torch.float64)[..., 6:]
    with torch.no_grad():
        actual = module(x)
    assert_agrees(actual, module(x).detach(), PARITY[actual.dtype])


def called(module, act):
    """The names of the submodules that a function calls, each at least once."""
    names = set()
    hooks = [
        m.register_forward_hook(lambda *_, name=name: names.add(name)) for name, m in module.named_modules() if name
    ]
    act()
    for hook in hooks:
        hook.remove()
    return names


@pytest.mark.parametrize("causal", [False, True])
def test_a_hook_on_any_submodule_sees_it_called(causal):
    module, args = layer(causal=causal), arguments()
    names = called(module, lambda: run(module, *args, causal))
    assert {"conv_module1.sigmoid", "balancer1", "feed_forward2.out_whiten", "self_attn1", "bypass"} <= names
    for name in sorted(names):
        seen = []

        def look(module, inputs, output, seen=seen):
            tensors = [x for x in (*inputs, output) if isinstance(x, torch.Tensor)]
            seen.append((tensors, [x.clone() for x in tensors]))

        hook = module.get_submodule(name).register_forward_hook(look)
        with torch.no_grad():
            actual = run(module, *args, causal)
        hook.remove()
        assert seen, name
        for tensors, copies in seen:  # nothing that was looked at is overwritten afterwards
            assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True)), name
        assert_agrees(actual, run(module, *args, causal).detach(), PARITY[actual.dtype])


def test_training_and_autocast_take_the_long_way(monkeypatch):
    module, args = layer(torch.float32), arguments(torch.float32)
    calls = []
    in_place = FeedforwardModule.in_place
    monkeypatch.setattr(FeedforwardModule, "in_place", lambda *args: calls.append(1) or in_place(*args))
    run(module, *args)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            run(module, *args)
        run(module.train(), *args)
        assert not calls
        run(module.eval(), *args)
        assert len(calls) == 3


@pytest.mark.parametrize("lane", lanes(swoosh._op, "triton", "cuda"))
def test_swoosh_over_its_input(lane):
    torch.manual_seed(0)
    for dtype in lane.dtypes:
        for shape in ((0, 5), (1, 1), (7, 33), (3, 5, 2000)):
            x, bias = torch.randn(shape).to(dtype) * 4, torch.randn(shape[-1]).to(dtype)
            for kind, b in (("l", bias), ("r", bias), ("l", None)):
                y = x.clone()
                with lane.active():
                    result = swoosh.swoosh_(y, kind, b)
                expected = swoosh.reference.swoosh(x.double() + (0 if b is None else b.double()), kind)
                assert result is y
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(y.double(), expected, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("lane", lanes(swoosh._op, "triton", "cuda"))
@pytest.mark.parametrize("strided", [(), ("x",), ("dy",), ("x", "dy")], ids=str)
def test_swoosh_backward_over_its_inputs(lane, strided):
    """Also over inputs that are not contiguous, which kernels do not take."""
    for dtype, kind, biased in itertools.product(lane.dtypes, "lr", (True, False)):
        for shape in ((0, 5), (1, 1), (7, 33), (3, 5, 2000)):
            x, dy = torch.randn(shape).to(dtype) * 4, (2 * torch.rand(shape) - 1).to(dtype)
            bias = torch.randn(shape[-1]).to(dtype) if biased else None
            exact = (x.double() + (bias.double() if biased else 0)).requires_grad_()
            expected = swoosh.reference.swoosh(exact, kind)
            wanted = torch.autograd.grad(expected, exact, dy.double())[0]
            x, dy = (t.mT.contiguous().mT if name in strided else t for name, t in (("x", x), ("dy", dy)))
            with lane.active(), torch.no_grad():
                results = swoosh.swoosh_backward_(dy, x, kind, bias)
            assert results[0] is dy
            assert results[1] is x
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(x.double(), expected.detach(), rtol=8 * eps, atol=8 * eps)
            torch.testing.assert_close(dy.double(), wanted, rtol=8 * eps, atol=8 * eps)


def test_swoosh_backward_names_what_does_not_fit():
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"bias must be of shape \(5,\) in torch.float32, got \(4,\)"):
        swoosh.swoosh_backward_(torch.randn(2, 5), x, "l", torch.randn(4))
    with pytest.raises(ValueError, match=r"bias must be of shape \(5,\) in torch.float32, got \(5,\) in torch.float64"):
        swoosh.swoosh_backward_(torch.randn(2, 5), x, "l", torch.randn(5).double())
    with pytest.raises(ValueError, match=r"dy must be of shape \(2, 5\) in torch.float32, got \(5,\) in torch.float32"):
        swoosh.swoosh_backward_(torch.randn(5), x, "l")
    with pytest.raises(
        ValueError, match=r"dy must be of shape \(2, 5\) in torch.float32, got \(2, 5\) in torch.bfloat16"
    ):
        swoosh.swoosh_backward_(torch.randn(2, 5).bfloat16(), x, "l")
    with use_backend("cpu"):
        if backend.missing["cpu"] is None:
            with pytest.raises(backend.BackendError, match="it takes"):
                swoosh.swoosh_backward_(*(torch.zeros(2, dtype=torch.int32) for _ in range(2)), "l")


def test_a_bias_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"bias must be of shape \(5,\) in torch.float32, got \(4,\)"):
        swoosh.swoosh_(torch.randn(2, 5), "l", torch.randn(4))
    with use_backend("cpu"):
        if backend.missing["cpu"] is None:
            with pytest.raises(backend.BackendError, match="it takes"):
                swoosh.swoosh_(torch.zeros(2, dtype=torch.int32), "l")
