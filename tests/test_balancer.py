"""The Balancer's compiled gradient against the formula in PyTorch, which is tested against upstream."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_rounded, relative_error, rounding

from zipformer_kernels import use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.training import balancer_native
from zipformer_kernels.training.balancer import Balancer, Moments, balanced_gradient

LIMITS = {"min_mean": -0.2, "max_mean": 0.3, "min_rms": 0.5, "max_rms": 0.9, "grad_scale": 0.04}

pytestmark = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"needs the cpu kernels: {backend.missing}")


def channels(*shape, dtype=torch.float32, offset=1.0):
    """Channels, last, whose means and sizes lie on either side of the limits; and a gradient."""
    size = torch.linspace(0.1, 3.0, shape[-1])
    x = torch.randn(shape) * size + offset * torch.linspace(-1.0, 1.0, shape[-1])
    return x.to(dtype), torch.randn(shape).to(dtype)


@torch.no_grad()
def both(grad, x, **kwargs):
    """The kernels' gradient, and the formula's in float64."""
    kwargs = {"channel_dim": -1} | LIMITS | kwargs
    assert balancer_native.serves(x, kwargs["channel_dim"])
    actual = balanced_gradient(grad, x, **kwargs)
    with use_backend("eager"):
        return actual, balanced_gradient(grad.double(), x.double(), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 7), (37, 3, 5), (70, 2, 64), (131, 3, 257), (9, 600)])
def test_kernels_are_the_formula(shape, dtype):
    torch.manual_seed(0)
    x, grad = channels(*shape, dtype=dtype)
    actual, expected = both(grad, x)
    assert_rounded(actual, expected, x[..., 0].numel(), "gradient")
    assert shape[-1] == 1 or not torch.equal(actual, grad)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([0.0, 3.0, 300.0]))
def test_moments_do_not_cancel(rows, width, seed, offset):
    torch.manual_seed(seed)
    x, _ = channels(rows, width, offset=offset)
    variance, mean = balancer_native.moments(x, 1)
    expected, expected_mean = torch.var_mean(x.double(), 0, correction=0)
    assert relative_error(mean, expected_mean) <= rounding(torch.float32, rows)
    # x - mean is rounded at the size of the offset
    allowed = rounding(torch.float32, rows) * (1 + offset) * max(1.0, expected.max().item())
    assert (variance - expected).abs().max() <= allowed


@pytest.mark.parametrize("case", ["channels last", "time last", "grad of other strides", "grad expanded"])
def test_layouts_whose_channels_lie_together(case):
    torch.manual_seed(0)
    x, grad = channels(2, 19, 6, 8)
    channel_dim = 1
    if case == "time last":
        x, grad = x[0].permute(1, 2, 0), grad[0].permute(1, 2, 0)
    else:
        x, grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    if case == "grad of other strides":
        grad = grad.contiguous()
    elif case == "grad expanded":
        grad = grad[:1, :, :1].expand(x.shape)
    actual, expected = both(grad, x, channel_dim=channel_dim)
    assert_rounded(actual, expected, x.select(channel_dim, 0).numel(), "gradient")


def test_other_layouts_and_choices_take_the_formula():
    x, _ = channels(4, 9, 8)
    with torch.no_grad():
        assert balancer_native.serves(x, 2)
        assert not balancer_native.serves(x, 1)
        assert not balancer_native.serves(x[:, ::2], 2)
        assert not balancer_native.serves(x[:0], 2)
        with use_backend("eager"):
            assert not balancer_native.serves(x, 2)
    assert not balancer_native.serves(x, 2)  # a gradient of the gradient may be wanted


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_constant_channels(value):
    x, grad = channels(50, 3)
    x[:, 1] = value
    actual, expected = both(grad, x)
    assert actual.isfinite().all()
    assert_rounded(actual, expected, 50, "gradient")


def test_moments_given_are_those_of_the_whole():
    torch.manual_seed(0)
    x, grad = channels(120, 6)
    moments = Moments()
    with torch.no_grad():
        for part in x.split(50):
            moments.add(part)
        parts = [
            balanced_gradient(g, part, moments=moments, channel_dim=1, **LIMITS)
            for g, part in zip(grad.split(50), x.split(50), strict=True)
        ]
    _, expected = both(grad, x)
    assert_rounded(torch.cat(parts), expected, 120, "gradient")


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
    gradient = balancer_native.gradient
    monkeypatch.setattr(balancer_native, "gradient", lambda *args: called.append(args) or gradient(*args))
    x = channels(40, 2, 8)[0].requires_grad_()
    Balancer(8, -1, prob=1.0)(x).sum().backward()
    assert len(called) == 1
    (dx,) = torch.autograd.grad(Balancer(8, -1, prob=1.0)(x).square().sum(), x, create_graph=True)
    assert len(called) == 1  # the formula, which can be differentiated
    assert dx.requires_grad
