"""What is special to swoosh_linear: its float64 formula, for `contract` too, masks of any sharing, and autocast."""

from functools import partial

import contract
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lanes import lanes
from tolerances import assert_rounded, relative_error, rounding

from zipformer_kernels.core import backend
from zipformer_kernels.ops.swoosh_linear import _op, swoosh_linear

NAMES = ("dx", "dweight", "dbias")


def activation(x, mask, kind):
    """mask * swoosh(x) in float64."""
    shift, offset = {"l": (4.0, 0.035), "r": (1.0, 0.313261687)}[kind]
    a = torch.logaddexp(torch.zeros((), dtype=x.dtype), x - shift) - 0.08 * x - offset
    return a if mask is None else a * mask


def call(args):
    return swoosh_linear(*args[:5])


run = partial(contract.run, call)


def assert_matches(args, y, dy, grads, backend=None, dtype=None):
    """Against float64. Sums cancel: errors are measured against the same sums of absolute values.

    In half precision every operand of a product is rounded too: one more rounding to `dtype` in each term.
    """
    x, weight, bias, mask, kind, *_ = args
    dtype = dtype or x.dtype
    in_channels, out_channels = x.shape[-1], weight.shape[0]
    rows = x.numel() // max(in_channels, 1)
    leaves = [None if a is None else a.detach().double().cpu().requires_grad_() for a in (x, weight, bias)]
    mask = None if mask is None else mask.detach().double().cpu()
    a = activation(leaves[0], mask, kind)
    value = F.linear(a, leaves[1], leaves[2])
    dy = dy.detach().double().cpu()
    wanted = [leaves[i] for i in grads]
    expected = dict(zip(grads, torch.autograd.grad(value, wanted, dy), strict=True)) if wanted else {}

    # Swoosh is itself a sum of terms of the size of x, or of 1.
    size = leaves[0].detach().abs().clamp(min=1) * (1 if mask is None else mask)
    flat, flat_dy = size.reshape(-1, in_channels), dy.reshape(-1, out_channels).abs()
    da = (flat_dy @ leaves[1].detach().abs()).view(x.shape)
    sizes = {
        "y": F.linear(size, leaves[1].detach().abs(), None if bias is None else leaves[2].detach().abs()),
        0: da if mask is None else da * mask,
        1: flat_dy.t() @ flat,
        2: flat_dy.sum(0),
    }
    terms = {"y": in_channels, 0: out_channels, 1: rows, 2: rows}
    assert y.dtype == dtype
    check(y, value, terms["y"], dtype, "y", sizes["y"])
    for i, grad in grads.items():
        assert grad.dtype == args[i].dtype
        check(grad, expected[i], terms[i], dtype, NAMES[i], sizes[i])


def check(actual, expected, terms, dtype, what, size):
    """`assert_rounded`; with one rounding to half precision per term of a sum taken of `dtype`."""
    if torch.finfo(dtype).bits == 16:
        assert actual.shape == expected.shape
        error = (actual.detach().double().cpu() - expected.detach()).abs()
        allowed = 4 * torch.finfo(dtype).eps * (size + expected.detach().abs()) + torch.finfo(dtype).smallest_normal
        assert (error <= allowed).all(), f"{what}: off by {(error / allowed).max():.2f} of what rounding explains"
    else:
        assert_rounded(actual, expected, max(terms, 1), what, size)


def leaf(*shape, device="cpu", dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(device).requires_grad_()


def dropout(*shape, device="cpu"):
    return (torch.rand(shape) > 0.3).to(device) * (1 / 0.7)


@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    in_channels=st.integers(1, 20),
    out_channels=st.integers(1, 9),
    shared=st.lists(st.booleans(), min_size=4, max_size=4),
    kind=st.sampled_from("lr"),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(_op))
def test_any_shape_and_any_sharing_of_the_mask(lane, shape, in_channels, out_channels, shared, kind, seed):
    torch.manual_seed(seed)
    shape = (*shape, in_channels)
    mask_shape = [1 if s else n for s, n in zip(shared, shape, strict=False)]
    masks = [None, dropout(*mask_shape), dropout(*mask_shape[1:])]
    for mask in masks:
        args = (
            leaf(*shape, device=lane.device, scale=4),
            leaf(out_channels, in_channels, device=lane.device),
            leaf(out_channels, device=lane.device),
            None if mask is None else mask.to(lane.device),
            kind,
        )
        with lane.active():
            y, dy, grads = run(args)
        assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("lane", lanes(_op))
def test_masks_of_other_dtypes(lane, mask_dtype):
    mask = (torch.rand(1, 3, 16, device=lane.device) > 0.5).to(mask_dtype) * 2
    args = (leaf(5, 3, 16, device=lane.device), leaf(4, 16, device=lane.device), None, mask, "r")
    with lane.active():
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lane", lanes(_op))
def test_autocast_is_what_it_is_to_linear(lane, given_dtype):
    """The product in autocast's dtype, gradients in the dtype of each argument."""
    torch.manual_seed(3)
    args = (
        leaf(9, 2, 24, device=lane.device, dtype=given_dtype, scale=3),
        leaf(5, 24, device=lane.device),
        leaf(5, device=lane.device),
        dropout(1, 2, 24, device=lane.device),
        "l",
    )
    with lane.active(), torch.autocast(lane.device.type, torch.bfloat16):
        if given_dtype == torch.float16 and lane.backend != "eager":
            with pytest.raises(backend.BackendError, match=r"float16 to itself only, not to torch\.bfloat16"):
                run(args)
            return
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads, dtype=torch.bfloat16)


@pytest.mark.parametrize("lane", lanes(_op, "triton", "cuda"))
def test_autocast_leaves_float64_alone(lane):
    args = [leaf(3, 4, dtype=torch.float64), leaf(2, 4, dtype=torch.float64), None, None, "r"]
    with lane.active(), torch.autocast("cpu", torch.bfloat16):
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("lane", lanes(_op))
def test_the_same_inputs_give_the_same_bits(lane):
    torch.manual_seed(4)
    args = (
        leaf(211, 3, 96, device=lane.device),
        leaf(32, 96, device=lane.device),
        leaf(32, device=lane.device),
        dropout(1, 3, 96, device=lane.device),
        "l",
    )
    dy = torch.randn(211, 3, 32, device=lane.device)
    with lane.active():
        y, _, grads = run(args, dy)
        for _ in range(3):
            again, _, grads_again = run(args, dy)
            assert torch.equal(y, again)
            assert all(torch.equal(grads[i], grads_again[i]) for i in range(3))
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("lane", lanes(_op))
def test_compiles_without_graph_breaks(lane):
    weight, bias = leaf(8, 8, device=lane.device), leaf(8, device=lane.device)

    def function(x):
        return swoosh_linear(swoosh_linear(x, weight, bias, x.detach()[:1].abs(), "l") * 2, weight, None, None, "r")

    with lane.active():
        for cast in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            for shape in ((5, 8), (3, 7, 8), (2, 9, 8)):
                x = leaf(*shape, device=lane.device)
                dy = torch.randn(shape, device=lane.device)
                with torch.autocast(lane.device.type, torch.bfloat16, enabled=cast):
                    y, wanted = compiled(x), function(x)
                assert y.dtype == wanted.dtype == (torch.bfloat16 if cast else torch.float32)
                inputs = (x, weight, bias)
                grads = torch.autograd.grad(y, inputs, dy.to(y.dtype))
                expected = torch.autograd.grad(wanted, inputs, dy.to(y.dtype))
                for grad, other in zip(grads, expected, strict=True):
                    assert relative_error(grad, other) <= rounding(y.dtype, y.numel())  # sums over rows and channels


def test_saves_its_arguments_only():
    args = (leaf(50, 3, 16), leaf(4, 16), leaf(4), dropout(1, 3, 16), "l")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swoosh_linear(*args)
    assert [t.data_ptr() for t in saved] == [a.data_ptr() for a in args[:4]]


def test_bad_input_is_named():
    x, weight = torch.randn(3, 4), torch.randn(2, 4)

    def raises(error, match, x=x, weight=weight, bias=None, mask=None, kind="l"):
        with pytest.raises(error, match=match):
            swoosh_linear(x, weight, bias, mask, kind)

    raises(TypeError, "x must be a tensor, got list", x=[1.0])
    raises(TypeError, "weight must be a tensor, got NoneType", weight=None)
    raises(TypeError, r"mask must be floating-point, got torch\.bool", mask=torch.ones(1, 4, dtype=torch.bool))
    raises(TypeError, r"weight must be of the dtype of x, torch\.float32, .*torch\.float16", weight=weight.half())
    raises(TypeError, r"bias must be of the dtype of x", bias=torch.ones(2).double())
    raises(ValueError, "kind must be 'l' or 'r', got 'swoosh'", kind="swoosh")
    raises(ValueError, r"weight must have shape .*got \(4, 2\) for \(3, 4\)", weight=weight.t())
    raises(ValueError, r"bias must have shape \(2,\), got \(4,\)", bias=torch.ones(4))
    raises(ValueError, r"mask must broadcast to x, of shape \(3, 4\), got \(2, 4\)", mask=torch.ones(2, 4))
    raises(ValueError, r"mask must broadcast to x", mask=torch.ones(1, 3, 4))
    raises(ValueError, "mask must not require a gradient", mask=torch.ones(1, 4, requires_grad=True))
    raises(ValueError, "bias must be on the device of x, cpu, got meta", bias=torch.ones(2, device="meta"))


@pytest.mark.gpu("2^31 elements and more")
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_more_elements_than_32_bits_count(name):
    rows = 2**31 // 512 + 100
    x = torch.randn(1, 512, device="cuda", dtype=torch.float16).repeat(rows, 1).requires_grad_()
    weight = leaf(8, 512, device="cuda", dtype=torch.float16)
    y = swoosh_linear(x, weight, None, dropout(1, 512, device="cuda"), "l", backend=name)
    assert torch.equal(y[-1], y[0])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx[-1], dx[0])
