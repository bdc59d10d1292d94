"""Schedules and everything that changes gradients, against upstream and against the formulas themselves."""

import random

import pytest
import torch
import upstream
from draws import seed_all, set_batch_count
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_same_run
from tolerances import PARITY, assert_parity, relative_error

from zipformer_kernels import modules, training
from zipformer_kernels.training.balancer import _abs_to_rms, _proportion_to_mean, balanced_gradient

numbers = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
knots = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5, unique_by=lambda pair: pair[0]).map(sorted)


@given(knots, knots, numbers, st.lists(numbers, min_size=1))
def test_piecewise_linear(first, second, number, xs):
    def functions(Piecewise):
        a, b = Piecewise(*first), Piecewise(*second)
        return [
            a,
            a * number,
            a + b,
            a + number,
            a.max(b),
            a.min(b),
            a.max(number),
            a.min(number),
            Piecewise(a),
        ]

    for ours, theirs in zip(
        functions(training.PiecewiseLinear), functions(upstream.scaling.PiecewiseLinear), strict=True
    ):
        assert ours.pairs == theirs.pairs
        assert [ours(x) for x in xs] == [theirs(x) for x in xs]
        assert ours == training.PiecewiseLinear(*theirs.pairs)


@given(knots, st.one_of(st.none(), numbers), st.booleans())
def test_scheduled_float(pairs, batch_count, train):
    def values(Scheduled):
        random.seed(0)
        first, second = Scheduled(*pairs, default=0.25), Scheduled((0.0, 1.0), (10.0, -2.0), default=0.5)
        schedules = [first, first + second, first + 3, first.max(second), first.max(0.5)]
        for schedule in schedules:
            schedule.batch_count = batch_count
            schedule.train(train)
        return [float(schedule) for schedule in schedules], random.getstate()

    assert values(training.ScheduledFloat) == values(upstream.scaling.ScheduledFloat)


@pytest.mark.parametrize("pairs", [(), ((1.0, 0.0), (1.0, 2.0)), ((2.0, 0.0), (1.0, 2.0))])
def test_schedule_refuses_bad_knots(pairs):
    with pytest.raises(ValueError, match="pairs"):
        training.ScheduledFloat(*pairs)


def channels(*scales_and_means, frames=40, dtype=torch.float64):
    """(frames, 2, channels): normal, one channel for each (scale, mean)."""
    scale, mean = torch.tensor(scales_and_means, dtype=dtype).T
    return torch.randn(frames, 2, len(scale), dtype=dtype) * scale + mean


# Channels that violate each limit, several at once, or none; one that is constant and one that is zero.
ODD = ((1, 0), (0.01, 0), (1, 5), (0.1, -0.3), (300, 0), (200, 900), (1e-3, 2), (0.05, 0.001), (0, 1), (0, 0))
LIMITS = [
    {},
    {"min_positive": 0.45, "max_positive": 0.55, "min_abs": 0.2, "max_abs": 4.0},
    {"min_positive": 0.3, "max_positive": 1.0, "min_abs": 0.75, "max_abs": 5.0, "grad_scale": 0.3},
    {"min_positive": 0.0, "max_positive": 1.0, "min_abs": 0.0, "max_abs": 1e4},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("limits", LIMITS, ids=range(len(LIMITS)))
def test_balancer(limits, channel_dim, dtype):
    torch.manual_seed(0)
    # Upstream's variance, E[x^2] - E[x]^2, has no digits left in float32 for the last few channels.
    x = channels(*(ODD if dtype == torch.float64 else ODD[:6])).to(dtype).movedim(-1, channel_dim)
    arguments = (x.shape[channel_dim], channel_dim)
    ours, theirs = (c(*arguments, prob=1.0, **limits) for c in (training.Balancer, upstream.scaling.Balancer))
    tolerance = PARITY[dtype] * (1 if dtype == torch.float64 else 3)
    assert_same_run(ours, theirs, [x.contiguous()], tolerance=tolerance)


@pytest.mark.parametrize("limits", LIMITS[:3], ids=range(3))
def test_balancer_gradient_is_that_of_its_loss(limits):
    """Against autograd on the loss itself, in float64."""
    torch.manual_seed(0)
    limits = {
        "min_positive": 0.05,
        "max_positive": 0.95,
        "min_abs": 0.2,
        "max_abs": 100.0,
        "grad_scale": 0.04,
    } | limits
    min_mean, max_mean = (_proportion_to_mean(limits[key]) for key in ("min_positive", "max_positive"))
    min_rms, max_rms = (_abs_to_rms(limits[key]) for key in ("min_abs", "max_abs"))
    x = channels(*ODD[:-2]).requires_grad_()
    mean, stddev, rms = x.mean((0, 1)), x.std((0, 1), correction=0), x.square().mean((0, 1)).sqrt()
    ratio = mean / stddev
    loss = (ratio - ratio.clamp(min_mean, max_mean)).abs() + (rms.clamp(min_rms, max_rms) / rms).log().abs()
    (direction,) = torch.autograd.grad(loss.sum(), x)
    direction = direction / direction.square().mean((0, 1)).sqrt().clamp(min=1e-20)
    grad = torch.randn_like(x)
    expected = grad + grad.abs() * direction * limits["grad_scale"]

    actual = balanced_gradient(
        grad,
        x.detach(),
        channel_dim=-1,
        min_mean=min_mean,
        max_mean=max_mean,
        min_rms=min_rms,
        max_rms=max_rms,
        grad_scale=limits["grad_scale"],
    )
    assert relative_error(expected, grad) > 1e-6
    assert_parity(actual, expected.detach(), 1e-10, "gradient")


def test_balancer_inside_its_limits_changes_nothing():
    x = channels((1, 0), (2, 0.5)).requires_grad_()
    training.Balancer(2, -1, prob=1.0)(x).backward(grad := torch.randn_like(x))
    assert torch.equal(x.grad, grad)


def test_half_precision_gradients_keep_their_dtype():
    x = channels(*ODD[:4]).bfloat16().requires_grad_()
    whiten = training.Whiten(1, 1.0, prob=1.0, grad_scale=0.1)
    whiten(training.Balancer(4, -1, prob=1.0)(x)).backward(torch.randn_like(x))
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("groups", "limit"), [(1, 1.5), (2, 1.1), (4, 1.1), (1, 50.0)])
def test_whiten(groups, limit, dtype):
    torch.manual_seed(0)
    x = (torch.randn(30, 2, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)).to(dtype)
    classes = (training.Whiten, upstream.scaling.Whiten)
    ours, theirs = (c(groups, limit, prob=(0.3, 1.0), grad_scale=0.2) for c in classes)
    for seed in range(5):  # over the limit it keeps looking, under it mostly not
        assert_same_run(ours, theirs, [x], seed=seed)
        assert ours.prob == theirs.prob
    assert ours.prob == (0.3 if limit == 50.0 else 1.0)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_whiten_is_as_exact_as_upstreams(mean):
    """In float32, against float64: also where the mean is far larger than the deviation."""
    torch.manual_seed(0)
    x = mean + torch.randn(600, 32) @ torch.randn(32, 32) / 6
    grad = torch.randn_like(x)

    def added(Whiten, dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        Whiten(1, 1.01, prob=1.0, grad_scale=0.2)(leaf).backward(grad.to(dtype))
        return leaf.grad.double() - grad

    with upstream.wide():
        expected = added(upstream.scaling.Whiten, torch.float64)
    ours, theirs = (added(c, torch.float32) - expected for c in (training.Whiten, upstream.scaling.Whiten))
    assert 0 < ours.norm() <= 2 * theirs.norm()


def test_whiten_draws_for_upstreams_log():
    """With a schedule, upstream's rare line of log costs a further draw: over a thousand calls it occurs."""
    x = torch.randn(6, 4, dtype=torch.float64)
    classes = (
        (training.ScheduledFloat, training.Whiten),
        (upstream.scaling.ScheduledFloat, upstream.scaling.Whiten),
    )
    states = []
    for Scheduled, Whiten in classes:
        whiten = Whiten(1, Scheduled((0.0, 1.1), (10.0, 2.0), default=1.1), prob=1.0, grad_scale=0.1)
        set_batch_count(whiten, 5)
        seed_all(0)
        for _ in range(1000):
            leaf = x.clone().requires_grad_()
            whiten(leaf).backward(x)
        states.append(random.getstate())
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2.0, 0.5, 0.1), "num_groups"),
        ((1, 0.5, 0.5, 0.1), "whitening_limit"),
        ((1, 2.0, (0.5, 0.2), 0.1), "prob"),
        ((1, 2.0, 0.5, -0.1), "grad_scale"),
    ],
)
def test_whiten_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        training.Whiten(*arguments)


def test_wrong_channels_are_refused():
    x = torch.zeros(4, 5, requires_grad=True)
    with pytest.raises(ValueError, match="wanted 6 channels"):
        training.Balancer(6, -1, prob=1.0)(x)
    with pytest.raises(ValueError, match="2 equal groups, got 5"):
        training.Whiten(2, 2.0, prob=1.0, grad_scale=0.1)(x)


def gradient(function, x, seed=0):
    leaf = x.clone().requires_grad_()
    seed_all(seed)
    y = function(leaf)
    assert torch.equal(y, x)
    y.backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x).roll(3, 0))
    return leaf.grad, random.getstate()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_limit_param_value(seed, train):
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    ours, theirs = (
        gradient(lambda x, f=f: f(x, min=-1.0, max=2.0, training=train), x, seed)
        for f in (training.limit_param_value, upstream.scaling.limit_param_value)
    )
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]


def test_limit_param_value_refuses_an_empty_interval():
    with pytest.raises(ValueError, match="min must not exceed max"):
        training.limit_param_value(torch.zeros(2), min=1.0, max=0.0, prob=1.0)


def test_penalize_abs_values_gt():
    x = torch.linspace(-60, 60, 50, dtype=torch.float64)
    ours, theirs = (
        gradient(lambda x, f=f: f(x, limit=25.0, penalty=0.01, name="scores"), x)
        for f in (training.penalize_abs_values_gt, upstream.scaling.penalize_abs_values_gt)
    )
    assert_parity(ours[0], theirs[0], 1e-15, "gradient")
    assert ours[1] == theirs[1]


def test_dropout3_passes_gradients_through_zeros():
    """Where the input is zero upstream's gradient is too; the derivative of dropout is its mask."""
    x = torch.zeros(50, 4, requires_grad=True)
    training.Dropout3(0.5, shared_dim=0)(x).sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}
    assert (x.grad == x.grad[0]).all()


def test_modules_found_by_the_training_loop():
    """icefall sets `batch_count` and `name` wherever it finds them: in the same places as upstream's."""

    def places(classes):
        layer = classes.ZipformerEncoderLayer(16, 10, 4, 4, 2, 4, 24)
        stack = classes.ZipformerEncoder(layer, 2, 10, 0.1, 0.0, 10.0)
        model = classes.DownsampledZipformerEncoder(stack, 16, 2, 0.1, False)
        set_batch_count(model, 7)
        return {
            name: (getattr(module, "batch_count", None), getattr(module, "name", None))
            for name, module in model.named_modules()
        }

    assert places(modules) == places(upstream.zipformer)
