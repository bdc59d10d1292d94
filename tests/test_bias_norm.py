"""What is special to BiasNorm: its float64 formula, for `contract` too, any channel dimension, and magnitudes."""

import math
from functools import partial

import contract
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lanes import lanes
from tolerances import assert_agrees, assert_rounded, rounding

from zipformer_kernels.core import backend
from zipformer_kernels.ops.bias_norm import _op, bias_norm

# Eager takes squares as they are; the kernels rescale a row whose squares leave the range of float32.
RESCALING = lanes(_op, "eager")


def formula(x, bias, log_scale, channel_dim=-1):
    """The op in float64, in one line, with gradients by autograd."""
    x = x.movedim(channel_dim, -1)
    y = x * log_scale.exp() / (x - bias).square().mean(-1, keepdim=True).sqrt()
    return y.movedim(-1, channel_dim)


def expected(args, dy, channel_dim=-1):
    """Value and gradients of the formula, and the sizes of the terms in the gradients of x, bias and log_scale."""
    args = [a.detach().double().cpu().requires_grad_() for a in args]
    y = formula(*args, channel_dim)
    dy = dy.detach().double().cpu()
    grads = torch.autograd.grad(y, args, dy)
    direct = dy * (y / args[0]).detach()  # what dx would be if the rms were constant
    through_rms = (direct - grads[0]).movedim(channel_dim, -1)  # a row's part of dbias: a sum over its channels times x
    terms = (dy * y.detach()).movedim(channel_dim, -1)
    cancelled = terms.abs().sum(-1, keepdim=True) / terms.sum(-1, keepdim=True).abs().clamp_min(1e-300)
    dbias_size = (through_rms.abs() * cancelled).flatten(0, -2).sum(0) if terms.ndim > 1 else through_rms * cancelled
    return y, grads, (direct.abs() + (grads[0] - direct).abs(), dbias_size, (dy * y).norm())


def call(args, channel_dim=-1):
    return bias_norm(*args, channel_dim)


def run(args, dy=None, channel_dim=-1):
    return contract.run(partial(call, channel_dim=channel_dim), args, dy)


def assert_matches(args, y, dy, grads, backend=None, channel_dim=-1):
    x, bias, log_scale = args
    channels, rows = len(bias), x.numel() // max(len(bias), 1)
    value, (dx, dbias, dlog_scale), (dx_size, dbias_size, size) = expected(args, dy, channel_dim)
    assert y.dtype == torch.promote_types(x.dtype, bias.dtype)
    assert all(grad.dtype == args[i].dtype for i, grad in grads.items())
    assert_rounded(y, value, channels, "y")
    if 0 in grads:
        assert_rounded(grads[0], dx, channels, "dx", dx_size)
    if 1 in grads:
        assert_rounded(grads[1], dbias, max(rows, channels), "dbias", dbias_size)
    if 2 not in grads:
        return
    assert grads[2].shape == log_scale.shape
    wide = torch.promote_types(log_scale.dtype, torch.float32)
    allowed = rounding(wide, channels) * size
    if log_scale.dtype != wide:
        allowed = allowed + torch.finfo(log_scale.dtype).eps * dlog_scale.abs()
    assert (grads[2].double().cpu() - dlog_scale).abs() <= allowed


def parameters(channels, device="cpu", dtype=torch.float32):
    bias = (torch.randn(channels) * 0.5).to(dtype).to(device).requires_grad_()
    return bias, torch.full((), 0.4, dtype=dtype, device=device, requires_grad=True)


@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    channels=st.integers(1, 40),
    channel_dim=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(_op))
def test_any_shape_and_channel_dimension(lane, shape, channels, channel_dim, seed):
    torch.manual_seed(seed)
    channel_dim = min(channel_dim, len(shape))
    shape = [*shape[:channel_dim], channels, *shape[channel_dim:]]
    x = (torch.randn(shape, device=lane.device) * 5).requires_grad_()
    args = (x, *parameters(channels, lane.device))
    for dim in (channel_dim, channel_dim - len(shape)):
        with lane.active():
            y, dy, grads = run(args, channel_dim=dim)
        assert_matches(args, y, dy, grads, channel_dim=dim)


@pytest.mark.parametrize("lane", lanes(_op))
def test_half_precision_up_to_its_limit(lane):
    for value, bias in ((65504.0, 0.0), (-65504.0, 1e4), (6e-8, 0.0), (2**-14, 2**-20)):
        x = torch.full((5, 48), value, dtype=torch.float16, device=lane.device)
        x[:, ::2] *= -1
        args = (
            x.requires_grad_(),
            torch.full((48,), bias, device=lane.device, requires_grad=True),
            torch.zeros((), device=lane.device, requires_grad=True),
        )
        with lane.active():
            y, dy, grads = run(args, torch.randn(5, 48, device=lane.device) * abs(value))
        assert torch.isfinite(y).all()
        assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("channels", [7, 48, 3000])
@pytest.mark.parametrize("lane", RESCALING)
def test_rows_of_any_magnitude(lane, channels):
    torch.manual_seed(2)
    scales = torch.tensor([1e-36, 1e-25, 1e-18, 1e-12, 1.0, 1e12, 1e18, 1e25, 1e34])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(len(scales), channels).uniform_(0.5, 2) * scales[:, None]  # no subnormal numbers
        x[:, ::2] *= -1
        x = x.to(dtype).to(lane.device).requires_grad_()
        args = (
            x,
            torch.zeros(channels, device=lane.device),
            torch.zeros((), device=lane.device, requires_grad=True),
        )
        with lane.active():
            y = bias_norm(*args)
            dy = torch.randn_like(y)
            dx, dlog_scale = torch.autograd.grad(y, (x, args[2]), dy)
        value, (wanted, _, wanted_scale), (dx_size, _, size) = expected(args, dy)
        for row in range(len(scales)):
            assert_rounded(y[row], value[row], channels, f"y at {scales[row]:.0e}")
            assert_rounded(dx[row], wanted[row], channels, f"dx at {scales[row]:.0e}", dx_size[row])
        assert (dlog_scale.double().cpu() - wanted_scale).abs() <= rounding(torch.float32, channels) * size


@pytest.mark.parametrize("lane", lanes(_op))
def test_nan_stays_in_its_row_and_a_row_equal_to_the_bias_is_infinite(lane):
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, math.nan, 1.0], [4.0, 5.0, 6.0], [0.5, -0.25, 0.0]])
    bias = torch.tensor([0.5, -0.25, 0.0])
    with lane.active():
        y = bias_norm(x.to(lane.device), bias.to(lane.device), torch.zeros((), device=lane.device)).cpu()
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()
    assert y[3, :2].tolist() == [math.inf, -math.inf]
    assert y[3, 2].isnan()


@pytest.mark.parametrize(("height", "channels"), [(300, 96), (40, 1500), (70, 33)])
@pytest.mark.parametrize("lane", lanes(_op))
def test_the_same_inputs_give_the_same_bits(lane, height, channels):
    torch.manual_seed(3)
    args = (
        torch.randn(height, channels, device=lane.device, requires_grad=True),
        *parameters(channels, lane.device),
    )
    dy = torch.randn(height, channels, device=lane.device)
    threads = torch.get_num_threads()
    try:
        with lane.active():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results = [*run(args, dy)[2].values(), bias_norm(*args)]
                if count == 1:
                    first = results
                if lane.backend != "eager":
                    assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert_matches(args, results[3], dy, dict(enumerate(results[:3])))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("lane", lanes(_op))
def test_frozen_arguments_get_no_gradient(lane, wanted):
    torch.manual_seed(4)
    for channels in (64, 65, 3000):
        args = (torch.randn(9, channels, device=lane.device), *parameters(channels, lane.device))
        args = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(args)]
        dy = torch.randn(9, channels, device=lane.device)
        with lane.active():
            bias_norm(*args).backward(dy)
        _, grads, _ = expected(args, dy)
        for i, (a, wanted_grad) in enumerate(zip(args, grads, strict=True)):
            assert (a.grad is not None) == (i in wanted)
            if i in wanted:
                assert_rounded(a.grad, wanted_grad, 8 * channels, f"gradient {i}")


@pytest.mark.parametrize("lane", lanes(_op))
def test_compiles_without_graph_breaks(lane):
    def function(x, bias, log_scale):
        return bias_norm(bias_norm(x, bias, log_scale, 1) * 2, bias, log_scale, 1)

    with lane.active():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for shape in ((5, 8), (3, 8, 7), (2, 8, 9)):
            args = (torch.randn(shape, device=lane.device, requires_grad=True), *parameters(8, lane.device))
            y, wanted = compiled(*args), function(*args)
            assert y.stride() == wanted.stride()
            dy = torch.randn(shape, device=lane.device)
            for a, b in zip(torch.autograd.grad(y, args, dy), torch.autograd.grad(wanted, args, dy), strict=True):
                assert_agrees(a, b, rounding(a.dtype, 3 * 7 * 8))


@pytest.mark.parametrize("lane", lanes(_op))
def test_half_input_with_float_parameters_gives_float_with_and_without_autocast(lane):
    args = parameters(8, lane.device)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, 8, device=lane.device).to(dtype)
        with lane.active():
            plain = bias_norm(x, *args)
            with torch.autocast(lane.device.type, torch.bfloat16):
                cast = bias_norm(x, *args)
        assert plain.dtype == cast.dtype == torch.float32
        assert torch.equal(plain, cast)


def test_saves_its_arguments_and_one_number_per_row():
    x = torch.randn(20, 30, requires_grad=True)
    bias, log_scale = parameters(30)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_norm(x, bias, log_scale)
    assert [t.data_ptr() for t in saved[:3]] == [t.data_ptr() for t in (x, bias, log_scale)]
    assert [t.shape for t in saved[3:]] == [(20,)]


def test_dtypes_that_kernels_do_not_mix_fall_back_and_say_why():
    x = torch.randn(3, 4, requires_grad=True)
    args = (x, *parameters(4, dtype=torch.float64))
    assert bias_norm(*args).dtype == torch.float64
    if not backend.missing["cpu"]:
        with pytest.raises(backend.BackendError, match="float64 bias needs a float64 x"):
            bias_norm(*args, backend="cpu")


def test_bad_input_is_named():
    x, scale = torch.randn(3, 4), torch.tensor(0.1)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        bias_norm([1.0], torch.ones(1), scale)
    with pytest.raises(TypeError, match=r"bias must be floating-point, got torch\.int64"):
        bias_norm(x, torch.ones(4, dtype=torch.int64), scale)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), as x has 4 channels, got \(3,\)"):
        bias_norm(x, torch.ones(3), scale)
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\)"):
        bias_norm(x, torch.ones(4), scale, 0)
    with pytest.raises(ValueError, match=r"channel_dim must be a dimension of x, of shape \(3, 4\), got 2"):
        bias_norm(x, torch.ones(4), scale, 2)
    with pytest.raises(ValueError, match=r"log_scale must have no dimensions, got shape \(1,\)"):
        bias_norm(x, torch.ones(4), torch.ones(1))
    with pytest.raises(ValueError, match="bias must be on the device of x, cpu, got meta"):
        bias_norm(x, torch.ones(4, device="meta"), scale)


@pytest.mark.gpu("2^31 elements and more")
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("channels", [512, 8192])
def test_more_elements_than_32_bits_count(name, channels):
    rows = 2**31 // channels + 100
    x = torch.randn(1, channels, device="cuda", dtype=torch.float16).repeat(rows, 1).requires_grad_()
    bias, log_scale = parameters(channels, "cuda", torch.float16)
    y = bias_norm(x, bias, log_scale, backend=name)
    assert torch.equal(y[-1], y[0])
    dx, dbias, _ = torch.autograd.grad(y, (x, bias, log_scale), y.detach())
    assert torch.equal(dx[-1], dx[0])
    assert torch.isfinite(dbias).all()
