"""ScaledAdam against upstream's, step for step, and upstream's optimizer checkpoints to and fro."""

import contextlib
import logging
import math
import types
from unittest import mock

import pytest
import torch
import upstream
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import HAS_GPU
from optim_steps import dtypes_on_lanes, full_speed, in_float64, on_lanes, once, run_on_lanes  # noqa: F401

from zipformer_kernels.optim import ScaledAdam, upstream_state_dict

# Hundreds of steps of the same maths in another order; a step's error is a rounding of the step, not of the
# parameter.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}

SHAPES = [
    (3, 5),
    (7,),
    (),
    (1,),
    (2, 3, 4),
    (0, 3),
    (3, 5),
    (1, 1),
    (17, 33),
    (129,),
    (),
    (8, 1, 31),
    (2, 0),
    (5, 3),
]
# From below param_min_rms, where scales stand still, to above param_max_rms, where they shrink.
RMS = [0.3, 0.0, 0.5, 9.99, 2.99, 1.0, 3.5, -9.99, 0.05, 1e-6, -0.01, 0.3, 1.0, 1.5]
OPTIONS = {
    "plain": {"lr": 0.045},
    "clipping": {"lr": 0.045, "clipping_scale": 2.0},
    "odd periods": {"lr": 0.03, "clipping_scale": 1.0, "size_update_period": 3, "clipping_update_period": 35},
    "period of one": {
        "lr": 0.03,
        "clipping_scale": 1.5,
        "size_update_period": 1,
        "clipping_update_period": 7,
    },
    "scales at their limits": {"lr": 0.3, "clipping_scale": 1.0, "scalar_lr_scale": 1.0},
    "other decay": {"lr": 0.02, "betas": (0.8, 0.95), "scalar_lr_scale": 0.3, "eps": 1e-6, "scalar_max": 2.0},
}


class _WideTorch(types.ModuleType):
    """The module torch with float64 under the name float, in which upstream keeps its state."""

    float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def upstream_in(dtype):
    """Upstream's optimizer with all its state in `dtype`, and without its log."""
    default = torch.get_default_dtype()
    wide = mock.patch.object(upstream.optim, "torch", _WideTorch("torch"))
    torch.set_default_dtype(dtype)
    logging.disable(logging.WARNING)
    try:
        with wide if dtype == torch.float64 else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(default)
        logging.disable(logging.NOTSET)


def make_params(dtype, shapes=tuple(SHAPES), rms=tuple(RMS), seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
    values = [r * (x if x.numel() > 1 else torch.ones_like(x)) for x, r in zip(noise, rms, strict=True)]
    return [torch.nn.Parameter(x.to(torch.get_default_device(), dtype)) for x in values]


def make_batches(dtype, steps, shapes=tuple(SHAPES), seed=1):
    """Gradients of every step: drift and noise, of very different sizes; some missing, some zero."""
    generator = torch.Generator().manual_seed(seed)

    def randn(shape=()):
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    drift = [2.0 * randn(shape) for shape in shapes]
    batches = []
    for i in range(steps):
        loudness = math.exp(1.5 * randn())
        batch = []
        for k, shape in enumerate(shapes):
            g = loudness * 10.0 ** (k % 5 - 3) * (randn(shape) + drift[k])
            luck = float(torch.rand((), generator=generator, device="cpu"))
            batch.append(
                None if luck < 0.1 or i % 37 == 36 else (g * (luck > 0.15)).to(torch.get_default_device(), dtype)
            )
        batches.append(batch)
    return batches


def train(optimizer, params, batches, new_lrs=None):
    """Yields after every step. `new_lrs`: a factor on all learning rates, by step."""
    for i, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] *= (new_lrs or {}).get(i, 1.0)
        for p, g in zip(params, batch, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        yield


def upstream_adam(params, **options):
    optimizer = upstream.optim.ScaledAdam(params, **options)
    optimizer.show_dominant_parameters = False  # only logs, and stumbles over empty tensors
    return optimizer


def largest_error(ours, theirs, sizes):
    """The largest error of any parameter, relative to its RMS or, if greater, to the RMS in `sizes`.

    A parameter of one element may cross zero, where it has no size of its own.
    """
    for k, q in enumerate(theirs):
        if q.numel():
            rms = q.detach().double().square().mean().sqrt().item()
            sizes[k] = max(sizes[k], rms)
    errors = [
        (p - q).detach().double().abs().max().item() / size
        for p, q, size in zip(ours, theirs, sizes, strict=True)
        if q.numel()
    ]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def compare(our_adam, their_adam, batches, ours, theirs, new_lrs=None):
    """Trains both; the largest error of any parameter after any step, relative to its largest RMS so far."""
    sizes = [0.0] * len(theirs)
    our_steps = train(our_adam, ours, batches, new_lrs)
    their_steps = train(their_adam, theirs, batches, new_lrs)
    return max(largest_error(ours, theirs, sizes) for _ in zip(our_steps, their_steps, strict=True))


def in_groups(params):
    return [
        {"params": params[:6]},
        {"params": params[6:7], "lr": 0.1},
        {"params": params[7:], "scalar_lr_scale": 0.2},
    ]


@dtypes_on_lanes("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_agrees_over_300_steps(options, grouped, dtype):
    with upstream_in(dtype):
        ours, theirs = make_params(dtype), make_params(dtype)
        arrange = in_groups if grouped else list
        our_adam = ScaledAdam(arrange(ours), **options)
        their_adam = upstream_adam(arrange(theirs), **options)
        batches = make_batches(dtype, 300)
        error = compare(our_adam, their_adam, batches, ours, theirs, {100: 0.5, 200: 3.0})
    assert error <= TOLERANCE[dtype]
    for p, before in zip(ours, make_params(dtype), strict=True):
        if p.numel() and before.abs().max() > 1e-3:  # a thousandth and more, where the tolerance is 2e-6
            assert (p - before).square().mean().sqrt() > 1e-3 * before.square().mean().sqrt()
    assert [d.threshold < math.inf for d in our_adam.diagnostics()] == ["clipping_scale" in options] * (
        3 if grouped else 1
    )


@on_lanes(lambda lane: lane.backend in ("triton", "cuda"))
def test_gpu_kernels_agree_over_300_steps():
    few = slice(None) if HAS_GPU else slice(4, 9)  # simulated kernels take their time
    options, shapes, rms = OPTIONS["clipping"], SHAPES[few], RMS[few]
    with upstream_in(torch.float32):
        ours, theirs = (make_params(torch.float32, shapes, rms) for _ in range(2))
        adams = ScaledAdam(ours, **options), upstream_adam(theirs, **options)
        error = compare(*adams, make_batches(torch.float32, 300, shapes), ours, theirs, {100: 0.5, 200: 3.0})
    assert error <= TOLERANCE[torch.float32]


@once
@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": 0.0451},
        {"betas": (0.9, 0.9801)},
        {"betas": (0.901, 0.98)},
        {"scalar_lr_scale": 0.101},
        {"size_update_period": 5},
        {"clipping_scale": 1.99},
        {"clipping_update_period": 101},
        {"param_max_rms": 2.98},
        {"param_min_rms": 2e-5},
        {"scalar_max": 9.995},
        {"eps": 1e-6},
    ],
    ids=str,
)
def test_every_option_is_noticed(wrong):
    options = OPTIONS["clipping"]
    with upstream_in(torch.float32):
        ours, theirs = make_params(torch.float32), make_params(torch.float32)
        adams = ScaledAdam(ours, **{**options, **wrong}), upstream_adam(theirs, **options)
        error = compare(*adams, make_batches(torch.float32, 150), ours, theirs)
    assert error > 20 * TOLERANCE[torch.float32]


@in_float64
@settings(max_examples=20)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=4).map(tuple), min_size=1, max_size=8),
    seed=st.integers(0, 2**20),
    clipping_scale=st.sampled_from([None, 0.5, 2.0]),
    size_update_period=st.integers(1, 6),
    clipping_update_period=st.integers(1, 25),
    beta2=st.sampled_from([0.0, 0.5, 0.9, 0.98, 0.999]),
)
def test_agrees_for_any_shapes_and_options(shapes, seed, beta2, **options):
    options |= {"lr": 0.04, "betas": (0.9, beta2)}
    rms = [0.1 * (k + 1) for k in range(len(shapes))]
    with upstream_in(torch.float64):
        ours, theirs = (make_params(torch.float64, shapes, rms, seed) for _ in range(2))
        batches = make_batches(torch.float64, 45, shapes, seed)
        adams = ScaledAdam(ours, **options), upstream_adam(theirs, **options)
        error = compare(*adams, batches, ours, theirs)
    assert error <= TOLERANCE[torch.float64]


@once
def test_named_and_grouped_forms_of_upstream():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    named = list(model.named_parameters())
    forms = [
        lambda: model.parameters(),
        lambda: model.named_parameters(),
        lambda: [{"params": list(model[0].parameters()), "lr": 0.1}, {"params": list(model[1].parameters())}],
        lambda: [{"named_params": named[:2], "lr": 0.1}, {"named_params": named[2:]}],
        lambda: [{"named_params": named[:2], "lr": 0.1}, {"params": [named[2][1]]}],
    ]
    for form in forms:
        ours, theirs = ScaledAdam(form(), lr=0.03), upstream.optim.ScaledAdam(form(), lr=0.03)
        for our_group, their_group in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert [id(p) for p in our_group.pop("params")] == [id(p) for p in their_group.pop("params")]
            assert {name: value for name, value in our_group.items() if name != "param_names"} == their_group


@full_speed
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_counts_as_never_seen(poison):
    """Ours with three bad batches is upstream without them: in all groups, for one bad gradient."""
    dtype = torch.float32
    batches = make_batches(dtype, 80)
    options = OPTIONS["clipping"]
    with upstream_in(dtype):
        ours, theirs = make_params(dtype), make_params(dtype)
        our_adam = ScaledAdam(in_groups(ours), **options)
        for _ in train(upstream_adam(in_groups(theirs), **options), theirs, batches):
            pass
    for i, batch in enumerate(batches):
        if i in (0, 11, 51):
            bad = [torch.ones_like(p) for p in ours]
            bad[8][3, 4] = poison
            for _ in train(our_adam, ours, [bad]):
                pass
        for _ in train(our_adam, ours, [batch]):
            pass
    assert largest_error(ours, theirs, [abs(rms) for rms in RMS]) <= TOLERANCE[dtype]
    assert [d.skipped for d in our_adam.diagnostics()] == [3, 3, 3]
    assert [d.steps for d in our_adam.diagnostics()] == [80, 80, 80]


@full_speed
def test_upstream_lets_nan_into_every_parameter():
    batches = make_batches(torch.float32, 50)
    batches[45][8][3, 4] = math.nan
    with upstream_in(torch.float32):
        ours, theirs = make_params(torch.float32), make_params(torch.float32)
        for adam, params in ((upstream_adam, theirs), (ScaledAdam, ours)):
            for _ in train(adam(params, **OPTIONS["clipping"]), params, batches):
                pass
    assert theirs[8].isnan().any()
    assert all(p.isfinite().all() for p in ours)


@full_speed
@pytest.mark.parametrize("steps", [1, 17, 100])
@pytest.mark.parametrize("direction", ["from upstream", "to upstream"])
def test_training_moves_between_upstream_and_here(direction, steps):
    """Some steps there and 100 here, or the other way round, are as many all there."""
    dtype = torch.float32
    batches = make_batches(dtype, steps + 100)
    options = OPTIONS["clipping"]
    with upstream_in(dtype):
        whole, split = make_params(dtype), make_params(dtype)
        whole_adam = upstream_adam(in_groups(whole), **options)
        for _ in train(whole_adam, whole, batches, {0: 0.7}):
            pass
        if direction == "from upstream":
            first, second = upstream_adam(in_groups(split), **options), ScaledAdam(in_groups(split))
        else:
            first, second = ScaledAdam(in_groups(split), **options), upstream_adam(in_groups(split))
        for _ in train(first, split, batches[:steps], {0: 0.7}):
            pass
        second.load_state_dict(first.state_dict() if direction == "from upstream" else upstream_state_dict(first))
        for _ in train(second, split, batches[steps:]):
            pass
    assert largest_error(split, whole, [abs(rms) for rms in RMS]) <= TOLERANCE[dtype]


@full_speed
def test_an_upstream_checkpoint_comes_back_as_it_was():
    with upstream_in(torch.float32):
        params = make_params(torch.float32)
        theirs = upstream_adam(in_groups(params), **OPTIONS["clipping"])
        for _ in train(theirs, params, make_batches(torch.float32, 25)):
            pass
    ours = ScaledAdam(in_groups(params))
    ours.load_state_dict(theirs.state_dict())
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    ours.step()  # skipped, but packs the state
    expected, actual = theirs.state_dict(), upstream_state_dict(ours)
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, entries in expected["state"].items():
        assert actual["state"][index].keys() == entries.keys()
        for name, value in entries.items():
            if not torch.is_tensor(value):
                assert actual["state"][index][name] == pytest.approx(value, rel=1e-6), (index, name)
            elif not (name == "param_rms" and value.isnan().all()):  # upstream's rms of an empty tensor
                assert torch.equal(actual["state"][index][name], value), (index, name)


@once
def test_upstream_checkpoints_of_optimizers_that_never_stepped():
    ours, theirs = ScaledAdam(make_params(torch.float32)), upstream_adam(make_params(torch.float32))
    ours.load_state_dict(theirs.state_dict())
    assert not ours.state_dict()["state"]
    assert not upstream_state_dict(ours)["state"]


@once
def test_upstream_checkpoints_that_do_not_fit():
    with upstream_in(torch.float32):
        params = make_params(torch.float32)
        theirs = upstream_adam(params)
        for _ in train(theirs, params, make_batches(torch.float32, 2)):
            pass
    good = theirs.state_dict()
    other = [torch.nn.Parameter(torch.zeros(4, *p.shape)) for p in params]
    with pytest.raises(ValueError, match=r"'state' and 'param_groups', got the keys .*'model'"):
        ScaledAdam(params).load_state_dict({"model": {}, "optimizer": good})
    with pytest.raises(ValueError, match=r"sizes \[6, 1, 7\], got \[14\]"):
        ScaledAdam(in_groups(params)).load_state_dict(good)
    with pytest.raises(ValueError, match=r"exp_avg_sq of shape .* for '0.\d+'"):
        ScaledAdam(other).load_state_dict(good)
