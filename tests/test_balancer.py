"""The Balancer's compiled gradient against the formula in PyTorch, which is tested against upstream."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lanes import Lane, lanes
from tolerances import assert_rounded, relative_error, rounding

from zipformer_kernels import use_backend
from zipformer_kernels.core import backend, launch
from zipformer_kernels.ops.balancer import _op, balanced_gradient, channel_moments, cpu, reference
from zipformer_kernels.training.balancer import Balancer, Moments

CPU = Lane("cpu")
LANES = lanes(_op, "eager")
LIMITS = {"min_mean": -0.2, "max_mean": 0.3, "min_rms": 0.5, "max_rms": 0.9, "grad_scale": 0.04}

pytestmark = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"needs the cpu kernels: {backend.missing}")


def call(args):
    """The public function for the op's arguments."""
    grad, x, variance, mean, channel_dim, *limits = args
    moments = None if variance is None else (variance, mean)
    return balanced_gradient(
        grad, x, moments=moments, channel_dim=channel_dim, **dict(zip(LIMITS, limits, strict=True))
    )


def assert_matches(args, y, dy, grads, backend):
    """A result, and its gradient for that which came in, against the formula in float64."""
    grad, x, *moments = (t if t is None else t.detach().double().cpu() for t in args[:4])
    exact = reference.balanced_gradient(grad.requires_grad_(), x, *moments, *args[4:])
    (expected,) = torch.autograd.grad(exact, grad, dy.detach().double().cpu())
    terms = max(1, x.numel() // max(1, x.shape[args[4]]))
    assert y.dtype == args[0].dtype
    assert_rounded(y, exact, terms, "gradient")
    for found in grads.values():
        assert found.dtype == args[0].dtype
        assert_rounded(found, expected, terms, "gradient of the gradient")


def channels(*shape, dtype=torch.float32, offset=1.0):
    """Channels, last, whose means and sizes lie on either side of the limits; and a gradient."""
    size = torch.linspace(0.1, 3.0, shape[-1])
    x = torch.randn(shape) * size + offset * torch.linspace(-1.0, 1.0, shape[-1])
    return x.to(dtype), torch.randn(shape).to(dtype)


@torch.no_grad()
def both(grad, x, lane=CPU, **kwargs):
    """The kernels' gradient, and the formula's in float64."""
    kwargs = {"channel_dim": -1} | LIMITS | kwargs
    with lane.active():
        actual = balanced_gradient(grad.to(lane.device), x.to(lane.device), **kwargs).to(x.device)
    return actual, balanced_gradient(grad.double(), x.double(), **kwargs, backend="eager")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 7), (37, 3, 5), (70, 2, 64), (131, 3, 257), (9, 600)])
@pytest.mark.parametrize("lane", LANES)
def test_kernels_are_the_formula(lane, shape, dtype):
    if dtype not in lane.dtypes:
        return
    torch.manual_seed(0)
    x, grad = channels(*shape, dtype=dtype)
    actual, expected = both(grad, x, lane)
    assert_rounded(actual, expected, x[..., 0].numel(), "gradient")
    assert shape[-1] == 1 or not torch.equal(actual, grad)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([0.0, 3.0, 300.0]))
@pytest.mark.parametrize("lane", LANES)
def test_moments_do_not_cancel(lane, rows, width, seed, offset):
    torch.manual_seed(seed)
    x, _ = channels(rows, width, offset=offset)
    with lane.active():
        variance, mean = (found.cpu() for found in channel_moments(x.to(lane.device), 1))
    expected, expected_mean = torch.var_mean(x.double(), 0, correction=0)
    assert relative_error(mean, expected_mean) <= rounding(torch.float32, rows)
    # x - mean is rounded at the size of the offset
    allowed = rounding(torch.float32, rows) * (1 + offset) * max(1.0, expected.max().item())
    assert (variance - expected).abs().max() <= allowed


@pytest.mark.parametrize("case", ["channels last", "time last", "grad of other strides", "grad expanded", "slice"])
@pytest.mark.parametrize("lane", LANES)
def test_layouts_whose_channels_lie_together(lane, case):
    torch.manual_seed(0)
    x, grad = channels(2, 19, 6, 8)
    channel_dim = 1
    if case == "slice":
        x, channel_dim = x[..., 1:], -1
        grad = grad[..., :-1]
    elif case == "time last":
        x, grad = x[0].permute(1, 2, 0), grad[0].permute(1, 2, 0)
    else:
        x, grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    if case == "grad of other strides":
        grad = grad.contiguous()
    elif case == "grad expanded":
        grad = grad[:1, :, :1].expand(x.shape)
    actual, expected = both(grad, x, lane, channel_dim=channel_dim)
    assert_rounded(actual, expected, x.select(channel_dim, 0).numel(), "gradient")


def selected(x, channel_dim, request="auto"):
    return _op.select(request, x, x, None, None, channel_dim, *LIMITS.values())


def test_other_layouts_are_copied_and_auto_takes_the_formula():
    x, grad = channels(4, 9, 8)
    assert selected(x, 2) == "cpu"
    assert selected(x, 2, "eager") == "eager"
    for other, its_grad, channel_dim in ((x, grad, 1), (x[:, ::2], grad[:, ::2], 2)):
        assert selected(other, channel_dim) == "eager"
        assert selected(other, channel_dim, "cpu") == "cpu"
        actual, expected = both(its_grad, other, channel_dim=channel_dim)
        assert_rounded(actual, expected, other.select(channel_dim, 0).numel(), "gradient")
        assert actual.stride() == torch.empty_like(other).stride()


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 3, 0)])
@pytest.mark.parametrize("lane", lanes(_op))
def test_nothing_is_balanced_as_nothing(lane, shape):
    x = torch.zeros(shape, device=lane.device)
    with lane.active():
        assert balanced_gradient(x, x, channel_dim=-1, **LIMITS).shape == shape
        variance, mean = channel_moments(x, -1)
    assert variance.shape == mean.shape == shape[-1:]
    assert variance.isnan().all()
    assert mean.isnan().all()


def test_dtypes_that_differ_take_the_formula():
    x, grad = channels(4, 9, 8)
    assert balanced_gradient(grad.bfloat16(), x, channel_dim=-1, **LIMITS).dtype == torch.bfloat16
    with pytest.raises(backend.BackendError, match=r"balancer: backend 'cpu' cannot serve .*: it takes tensors of one"):
        balanced_gradient(grad.bfloat16(), x, channel_dim=-1, **LIMITS, backend="cpu")
    moments = (x.new_ones(8, dtype=torch.float64),) * 2
    with pytest.raises(backend.BackendError, match=r"it takes float32, got torch\.float64"):
        balanced_gradient(grad, x, moments=moments, channel_dim=-1, **LIMITS, backend="cpu")


def test_bad_arguments_are_named():
    x, grad = channels(4, 9, 8)

    def raises(error, match, grad=grad, x=x, moments=None, channel_dim=-1):
        with pytest.raises(error, match=match):
            balanced_gradient(grad, x, moments=moments, channel_dim=channel_dim, **LIMITS)

    raises(TypeError, "grad must be a tensor, got list", grad=[1.0])
    raises(TypeError, r"x must be floating-point, got torch\.int64", x=x.long())
    raises(ValueError, "x must be on the device of grad, cpu, got meta", x=x.to("meta"))
    raises(ValueError, r"x must have the shape of grad, \(4, 9, 8\), got \(4, 9, 7\)", x=x[..., :7])
    raises(ValueError, r"channel_dim must be a dimension of x, of shape \(4, 9, 8\), got 3", channel_dim=3)
    raises(ValueError, r"mean must have shape \(8,\), got \(7,\)", moments=(x[0, 0], x[0, 0, :7]))
    with pytest.raises(ValueError, match="channel_dim must be a dimension of x"):
        channel_moments(x, -4)


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("lane", LANES)
def test_constant_channels(lane, value):
    x, grad = channels(50, 3)
    x[:, 1] = value
    actual, expected = both(grad, x, lane)
    assert actual.isfinite().all()
    assert_rounded(actual, expected, 50, "gradient")


@pytest.mark.parametrize("lane", LANES)
def test_moments_given_are_those_of_the_whole(lane):
    torch.manual_seed(0)
    x, grad = (t.to(lane.device) for t in channels(120, 6))
    moments = Moments()
    with torch.no_grad(), lane.active():
        for part in x.split(50):
            moments.add(part)
        parts = [
            balanced_gradient(g, part, moments=moments.known, channel_dim=1, **LIMITS)
            for g, part in zip(grad.split(50), x.split(50), strict=True)
        ]
    _, expected = both(grad.cpu(), x.cpu())
    assert_rounded(torch.cat(parts).cpu(), expected, 120, "gradient")


def test_bits_do_not_depend_on_the_threads():
    x, grad = channels(700, 3, 96)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both(grad, x)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_module_runs_the_kernels(monkeypatch):
    called = []
    monkeypatch.setattr(cpu, "call_cpu", lambda name, *args: called.append(name) or launch.call_cpu(name, *args))
    x = channels(40, 2, 8)[0].requires_grad_()
    Balancer(8, -1, prob=1.0)(x).sum().backward()
    assert called == ["balancer_moments", "balancer_gradient"]
    with use_backend("eager"):
        y = Balancer(8, -1, prob=1.0)(x)
    y.sum().backward()
    assert len(called) == 2


@pytest.mark.parametrize("where", ["eager", "cpu", "auto"])
def test_gradients_of_gradients_are_those_of_the_formula(where):
    x, dy = (t.double().requires_grad_() for t in channels(40, 2, 8))
    found = []
    for request in (where, "eager"):
        with use_backend(request):
            y = Balancer(8, -1, prob=1.0, min_abs=0.5, max_abs=1.0)(x).square()
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, dy)))
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) <= rounding(torch.float64, 80)
