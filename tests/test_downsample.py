"""What is special to downsampling: its formula frame by frame, for `contract` too, slices, the module, bad input."""

from functools import partial

import contract
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lanes import lanes

from zipformer_kernels.modules import SimpleDownsample
from zipformer_kernels.ops.downsample import _op, downsample


def formula(src, bias, mask=None, channels=None):
    """Frame by frame."""
    frames, factor = len(src), len(bias)
    weights = bias.exp() / bias.exp().sum()
    y = src.new_zeros((-(-frames // factor), src.shape[1], channels or src.shape[2])) + 0 * (src.sum() + bias.sum())
    for i in range(len(y)):
        y[i, :, : src.shape[2]] = sum(weights[p] * src[min(i * factor + p, frames - 1)] for p in range(factor))
    return y if mask is None else y * mask


def call(args):
    return downsample(*args)


run = partial(contract.run, call)


def assert_matches(args, y, dy, grads, backend=None):
    exact, _, expected = contract.run(lambda args: formula(*args), contract.wide(args), dy.detach().double().cpu())
    bound = contract.TOLERANCE[y.dtype]
    assert y.is_contiguous()
    assert y.dtype == torch.promote_types(args[0].dtype, args[1].dtype)
    assert contract.relative(y, exact) <= bound
    floor = max(0.1 * dy.double().norm().item(), 1e-12)  # of a bias of one place there is only rounding
    for i, grad in grads.items():
        assert grad.dtype == args[i].dtype
        wanted = torch.zeros_like(grad) if expected[i] is None else expected[i]
        assert contract.relative(grad, wanted, floor) <= 3 * bound, f"gradient of argument {i}"


def arguments(frames, batch, channels, factor, device="cpu", dtype=torch.float32):
    shapes = (frames, batch, channels), (factor,)
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 4), st.integers(1, 90), st.integers(1, 9)),
    wider=st.integers(0, 90),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(_op))
def test_any_shape(lane, sizes, wider, masked, seed):
    torch.manual_seed(seed)
    args = arguments(*sizes, device=lane.device)
    channels = sizes[2] + wider
    mask = torch.rand(sizes[1], channels, device=lane.device) > 0.3 if masked else None
    with lane.active():
        y, dy, grads = run((*args, mask, channels))
    assert_matches((*args, mask, channels), y, dy, grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lane", lanes(_op))
def test_mixed_dtypes_promote(lane, dtype):
    for kinds in ((dtype, torch.float32), (torch.float32, dtype)):
        args = [
            arg.detach().to(kind).requires_grad_()
            for arg, kind in zip(arguments(9, 2, 6, 2, lane.device), kinds, strict=True)
        ]
        with lane.active():
            y, dy, grads = run(args)
        assert y.dtype == torch.float32
        for i, grad in grads.items():
            assert grad.dtype == kinds[i]
        wide = [arg.detach().double().requires_grad_() for arg in args]
        exact = formula(*wide)
        expected = torch.autograd.grad(exact, wide, dy.double())
        narrow = dtype if lane.backend == "eager" else torch.float32  # eager takes a softmax in its argument's dtype
        assert contract.relative(y, exact) <= contract.TOLERANCE[narrow]
        floor = 0.1 * dy.norm().item()
        for grad, wanted in zip(grads.values(), expected, strict=True):
            worst = narrow if grad.dtype == torch.float32 else grad.dtype
            assert contract.relative(grad, wanted, floor) <= 3 * contract.TOLERANCE[worst]


@pytest.mark.parametrize("lane", lanes(_op))
def test_a_slice_of_channels_is_read_in_place(lane):
    src, bias = arguments(11, 3, 20, 2, lane.device)
    args = src.detach()[..., 4:13].requires_grad_(), bias
    with lane.active():
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


def test_saves_its_arguments_only():
    args = arguments(6, 2, 5, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        downsample(*args)
    assert [t.data_ptr() for t in saved] == [arg.data_ptr() for arg in args]


def test_bad_input_is_named():
    src, bias = (arg.detach() for arg in arguments(6, 2, 5, 2))

    def raises(error, match, *more, **changed):
        with pytest.raises(error, match=match):
            downsample(*{"src": src, "bias": bias, **changed}.values(), *more)

    raises(TypeError, "src must be a tensor, got list", src=[1.0])
    raises(TypeError, r"bias must be floating-point, got torch\.int64", bias=bias.long())
    raises(ValueError, r"src must have shape \(T, B, C\), got \(6, 2\)", src=src[..., 0])
    raises(ValueError, r"bias must have shape \(F,\), got \(0,\)", bias=bias[:0])
    raises(ValueError, "channels must be 5 or more, as src has, got 4", None, 4)
    raises(ValueError, r"mask must have shape \(2, 7\), got \(2, 5\)", src[0], 7)
    raises(ValueError, "bias must be on the device of src, cpu, got meta", bias=bias.to("meta"))


@pytest.mark.parametrize("frames", [12, 13])
@pytest.mark.parametrize("lane", lanes(_op))
def test_the_module_is_the_formula(lane, frames):
    module = SimpleDownsample(8, 4, 0.0, causal=False).to(lane.device)
    module.bias.data.normal_()
    src = torch.randn(frames, 3, 8, device=lane.device).requires_grad_()
    args = [src, module.bias]
    with lane.active():
        y, dy, grads = contract.run(lambda args: module(args[0]), args)
    assert_matches(args, y, dy, grads)
    with torch.no_grad():
        assert contract.relative(module(src), y) <= contract.TOLERANCE[torch.float32]
