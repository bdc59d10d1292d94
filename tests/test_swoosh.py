"""What is special to Swoosh: its float64 formula, for `contract` too, the whole range of x, and rounding."""

import math
from functools import partial

import contract
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lanes import lanes
from tolerances import assert_agrees, rounding

from zipformer_kernels.core import backend
from zipformer_kernels.modules.swoosh import SwooshL, SwooshR
from zipformer_kernels.ops.swoosh import _op, swoosh_l, swoosh_r

FUNCTIONS = {"l": swoosh_l, "r": swoosh_r}
# Largest error as a multiple of the dtype's epsilon and of the scale max(1, |x|): the result is a sum of terms of that
# size, each rounded once or twice (float32), or rounded once at the end (half precision).
ULPS = {torch.float64: 2, torch.float32: 3, torch.float16: 1, torch.bfloat16: 1}


def reference(x, kind):
    """Value and derivative in float64, from the formula with no tricks."""
    x = x.detach().double().cpu()
    shift, offset = {"l": (4.0, 0.035), "r": (1.0, 0.313261687)}[kind]
    u = x - shift
    value = u.clamp(min=0) + torch.log1p(torch.exp(-u.abs())) - 0.08 * x - offset
    return value, 1 / (1 + torch.exp(-u)) - 0.08


def assert_values(x, y, kind):
    value, _ = reference(x, kind)
    scale = x.detach().double().cpu().abs().clamp(min=1)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert ((y.detach().double().cpu() - value).abs() <= ULPS[x.dtype] * torch.finfo(x.dtype).eps * scale).all()


def call(args):
    x, kind = args
    return FUNCTIONS[kind](x)


run = partial(contract.run, call)


def assert_matches(args, y, dy, grads, backend=None):
    (x, kind), dx = args, grads.get(0)
    assert_values(x, y, kind)
    if dx is None:
        return
    _, slope = reference(x, kind)
    tolerance = ULPS[x.dtype] * torch.finfo(x.dtype).eps
    expected = dy.double().cpu() * slope
    assert dx.dtype == x.dtype
    assert ((dx.double().cpu() - expected).abs() <= tolerance * dy.double().cpu().abs().clamp(min=1e-3)).all()


@pytest.mark.parametrize("kind", "lr")
@pytest.mark.parametrize("lane", lanes(_op))
def test_whole_range_is_finite_and_accurate(lane, kind):
    for dtype in lane.dtypes:
        largest = torch.finfo(dtype).max
        ends = [0.0, -0.0, 1.0, 4.0, 87.0, 88.5, 89.0, -87.0, -104.0, 1e4, -1e4, largest, -largest]
        x = torch.cat([torch.linspace(-30, 30, 4001, dtype=torch.float64), torch.tensor(ends, dtype=torch.float64)])
        x = x.to(dtype)
        x = x.to(lane.device).requires_grad_()
        with lane.active():
            y, dy, grads = run((x, kind), torch.ones_like(x))
        assert torch.isfinite(y).all()
        assert_matches((x, kind), y, dy, grads)


@pytest.mark.parametrize("lane", lanes(_op))
def test_nan_stays_nan(lane):
    x = torch.tensor([0.0, math.nan, 1.0], device=lane.device, requires_grad=True)
    with lane.active():
        y, _, grads = run((x, "l"), torch.ones_like(x))
    assert y.isnan().tolist() == [False, True, False]
    assert grads[0].isnan().tolist() == [False, True, False]


@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    kind=st.sampled_from("lr"),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(_op))
def test_any_shape(lane, shape, kind, seed):
    torch.manual_seed(seed)
    x = (torch.randn(shape, device=lane.device) * 5).requires_grad_()
    with lane.active():
        y, dy, grads = run((x, kind))
    assert_matches((x, kind), y, dy, grads)


@pytest.mark.parametrize("lane", lanes(_op))
def test_compiles_without_graph_breaks(lane):
    with lane.active():
        compiled = torch.compile(lambda x: SwooshR()(SwooshL()(x) * 2), fullgraph=True, backend="aot_eager")
        for shape in ((5,), (3, 7), (2, 7)):
            x = torch.randn(shape, device=lane.device, requires_grad=True)
            (dx,) = torch.autograd.grad(compiled(x).sum(), x)
            (expected,) = torch.autograd.grad(swoosh_r(swoosh_l(x) * 2).sum(), x)
            assert_agrees(dx, expected, rounding(x.dtype))


@pytest.mark.parametrize("lane", lanes(_op))
def test_autocast_keeps_the_dtype(lane):
    x = torch.randn(9, device=lane.device)
    with lane.active(), torch.autocast(lane.device.type, torch.bfloat16):
        assert swoosh_l(x).dtype == torch.float32
        assert swoosh_l(x.bfloat16()).dtype == torch.bfloat16


def test_saves_only_its_input():
    x = torch.randn(1000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swoosh_l(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_half_rounding_on_the_cpu_is_torchs():
    """Every half and bfloat16 survives the kernels' own conversions; rounding is to nearest even."""
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        finite = x[torch.isfinite(x)]
        y = swoosh_r(finite, backend="cpu")
        expected = swoosh_r(finite.double(), backend="eager").to(dtype)
        off = (y.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        near_zero = expected.abs() < 1e-3  # cancellation: the float32 result itself is off by several ulp there
        assert (off[~near_zero] <= 1).all()
        assert (off[~near_zero] > 0).float().mean() < 0.01


@pytest.mark.usefixtures("isa")
def test_every_instruction_set_agrees():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = (torch.randn(1013) * 6).to(dtype).requires_grad_()
        for kind in "lr":
            with backend.use_backend("cpu"):
                y, dy, grads = run((x, kind))
            assert_matches((x, kind), y, dy, grads)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        swoosh_l([1.0])
    with pytest.raises(TypeError, match=r"x must be floating-point, got torch\.int64"):
        swoosh_r(torch.ones(3, dtype=torch.int64))


@pytest.mark.gpu("launches on a side stream")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_launches_on_the_current_stream(name):
    side = torch.cuda.Stream()
    x = torch.zeros(1 << 22, device="cuda")
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(2.0)
        y = swoosh_l(x, backend=name)
    side.synchronize()
    assert_agrees(y, swoosh_l(torch.full_like(x, 2.0), backend="eager"), rounding(x.dtype))
