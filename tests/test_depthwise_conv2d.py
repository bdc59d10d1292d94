"""What is special to depthwise_conv2d: its float64 formula, for `contract` too, lengths, autocast and rounding."""

from functools import partial

import contract
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lanes import lanes
from tolerances import assert_rounded, relative_error, rounding

from zipformer_kernels.ops.depthwise_conv2d import _op, depthwise_conv2d
from zipformer_kernels.ops.depthwise_conv2d.cases import CASES
from zipformer_kernels.ops.depthwise_conv2d.cpu import _weight_gradient

SMALL = [case for case in CASES if not case.large]
NAMES = ("dx", "dweight", "dbias")
HALF = (torch.float16, torch.bfloat16)


def formula(x, weight, bias):
    """The op written as a sum over taps."""
    channels, _, high, wide = weight.shape
    frames, bins = x.shape[2:]
    padded = F.pad(x, (wide // 2, wide // 2, high // 2, high // 2))
    y = torch.zeros_like(x) if bias is None else torch.zeros_like(x) + bias[:, None, None]
    for i in range(high):
        for j in range(wide):
            y = y + padded[:, :, i : i + frames, j : j + bins] * weight[:, :, i, j].view(1, channels, 1, 1)
    return y


def differentiate(args, dy):
    leaves = [None if arg is None else arg.requires_grad_() for arg in args]
    y = formula(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True))
    return y.detach(), [None if leaf is None else next(found) for leaf in leaves]


def call(args):
    return depthwise_conv2d(*args)


run = partial(contract.run, call)


def assert_matches(args, y, dy, grads, backend=None):
    """Against float64; sums cancel, so errors are measured against the same sums of absolute values."""
    x, weight, _ = args
    exact = [None if arg is None else arg.detach().double().cpu() for arg in args]
    dy = dy.detach().double().cpu()
    value, expected = differentiate(exact, dy)
    size, sizes = differentiate([None if arg is None else arg.detach().abs() for arg in exact], dy.abs())
    taps = weight[0].numel()
    assert y.dtype == x.dtype
    assert y.stride() == torch.empty_like(x).stride()
    own = x.dtype in HALF  # torch's own convolutions then: forward and of x, in eager all
    if not own:
        assert_rounded(y, value, taps, "y", size)
    for i, grad in grads.items():
        assert grad.dtype == x.dtype
        assert grad.stride() == torch.empty_like(args[i]).stride()
        if not own:
            assert_rounded(grad, expected[i], taps if i == 0 else x[:, :1].numel() + 1, NAMES[i], sizes[i])


def arguments(batch, channels, frames, bins, kernel, device="cpu", dtype=torch.float32):
    made = {"device": device, "dtype": dtype}
    x = torch.randn(batch, frames, bins, channels, **made).permute(0, 3, 1, 2).requires_grad_()
    weight, bias = torch.randn(channels, 1, *kernel, **made), torch.randn(channels, **made)
    return [x, weight.requires_grad_(), bias.requires_grad_()]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
@pytest.mark.parametrize("lane", lanes(_op, "eager"))
def test_gradients_of_parameters_are_rounded_once_from_half_precision(lane, case, dtype):
    torch.manual_seed(0)
    args = case.inputs(dtype, lane.device)
    with lane.active():
        _, dy, grads = run(args)
    exact = [None if arg is None else arg.detach().double() for arg in args]
    _, expected = differentiate(exact, dy.double())
    _, sizes = differentiate([None if arg is None else arg.detach().abs() for arg in exact], dy.double().abs())
    for i in grads.keys() - {0}:
        assert grads[i].dtype == dtype
        assert_rounded(grads[i], expected[i], args[0][:, :1].numel() + 1, NAMES[i], sizes[i])


@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 40),
    frames=st.integers(0, 40),
    bins=st.integers(0, 24),
    half=st.tuples(st.integers(0, 4), st.integers(0, 5)),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(_op))
def test_any_shape(lane, batch, channels, frames, bins, half, seed):
    torch.manual_seed(seed)
    args = arguments(batch, channels, frames, bins, (2 * half[0] + 1, 2 * half[1] + 1), lane.device)
    with lane.active():
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("frames", [1, 2, 3, 15, 16, 17, 33, 1100])
@pytest.mark.parametrize("lane", lanes(_op))
def test_lengths_around_the_kernel_and_the_tile(lane, frames):
    torch.manual_seed(1)
    args = arguments(2, 19, frames, 5, (7, 7), lane.device)
    with lane.active():
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("lane", lanes(_op))
def test_autocast_is_what_it_is_to_the_convolution(lane):
    torch.manual_seed(4)
    for dtype, wanted in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        args = arguments(2, 24, 17, 7, (3, 3), lane.device, dtype)
        with lane.active(), torch.autocast(lane.device.type, torch.bfloat16):
            y, dy, grads = run(args)
            plain = F.conv2d(*args, padding=1, groups=24)
        assert y.dtype == plain.dtype == wanted
        assert [grad.dtype for grad in grads.values()] == [dtype] * 3
        expected = torch.autograd.grad(plain, args, dy)
        for grad, other in zip((y, *grads.values()), (plain, *expected), strict=True):
            assert relative_error(grad, other) <= rounding(wanted, args[0][:, :1].numel())


@pytest.mark.parametrize("lane", lanes(_op, "eager"))
def test_the_same_inputs_give_the_same_bits_on_any_number_of_threads(lane):
    """Of what the kernel computes; forward and dx are torch's."""
    torch.manual_seed(5)
    x, weight, _ = arguments(3, 40, 300, 19, (7, 7), lane.device)
    dy = torch.randn_like(x)
    threads = torch.get_num_threads()
    try:
        with lane.active(), torch.no_grad():
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(_weight_gradient(dy, x, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("lane", lanes(_op))
def test_compiles_without_graph_breaks(lane):
    _, *shared = arguments(1, 8, 1, 1, (3, 3), lane.device)
    compiled = torch.compile(lambda x: depthwise_conv2d(x, *shared), fullgraph=True, backend="aot_eager")
    with lane.active():
        for batch, frames in ((2, 5), (3, 7), (2, 11)):
            x = arguments(batch, 8, frames, 6, (3, 3), lane.device)[0]
            y, wanted = compiled(x), depthwise_conv2d(x, *shared)
            dy = torch.randn_like(y)
            grads, expected = (torch.autograd.grad(result, (x, *shared), dy) for result in (y, wanted))
            for grad, other in zip((y, *grads), (wanted, *expected), strict=True):
                assert relative_error(grad, other) <= rounding(x.dtype)


def test_saves_its_arguments_only():
    args = arguments(2, 8, 9, 5, (3, 3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        depthwise_conv2d(*args)
    assert [t.data_ptr() for t in saved] == [arg.data_ptr() for arg in args]


def test_bad_input_is_named():
    x, weight, bias = (arg.detach() for arg in arguments(2, 4, 6, 5, (3, 3)))

    def raises(error, match, **changed):
        with pytest.raises(error, match=match):
            depthwise_conv2d(**{"x": x, "weight": weight, "bias": bias} | changed)

    raises(TypeError, "x must be a tensor, got list", x=[1.0])
    raises(TypeError, "weight must be a tensor, got NoneType", weight=None)
    raises(TypeError, r"x must be floating-point, got torch\.int64", x=x.long())
    raises(TypeError, r"weight must be of the dtype of x, torch\.float32, .*torch\.float64", weight=weight.double())
    raises(TypeError, r"bias must be of the dtype of x, torch\.float32, .*torch\.float64", bias=bias.double())
    raises(ValueError, r"x must have shape .*, got \(4, 6, 5\)", x=x[0])
    raises(ValueError, r"weight must have shape \(4, 1, I, J\), got \(3, 1, 3, 3\)", weight=weight[:3])
    raises(ValueError, r"weight must have odd numbers of taps, got \(3, 2\)", weight=weight[..., :2])
    raises(ValueError, r"bias must have shape \(4,\), got \(3,\)", bias=bias[:3])
    raises(ValueError, "bias must be on the device of x, cpu, got meta", bias=bias.to("meta"))
