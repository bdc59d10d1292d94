"""Parameters, gradients and steps for the tests of ScaledAdam, and the backends they run on."""

from contextlib import nullcontext

import pytest
import torch
from lanes import HAS_GPU, lanes

from zipformer_kernels.ops import scaled_adam

LANES = lanes(scaled_adam._op)
# Without a GPU the others are simulated, a tenth of a second a step.
_FULL_SPEED = [p for p in LANES if HAS_GPU or p.values[0].backend in ("eager", "cpu")]


@pytest.fixture(name="lane", params=LANES, autouse=True)
def run_on_lanes(request):
    """Every test of a file that imports this runs on every backend, with new tensors on its device."""
    with request.param.active(), torch.device("cuda") if request.param.device.type == "cuda" else nullcontext():
        yield request.param


def on_lanes(wanted):
    """Restricts a test to the lanes that `wanted` says."""
    return pytest.mark.parametrize("lane", [p for p in LANES if wanted(p.values[0])], indirect=True)


def dtypes_on_lanes(argument, dtypes):
    """Runs a test on each lane at full speed with each of the dtypes that it takes."""
    pairs = [(p, dtype) for p in _FULL_SPEED for dtype in dtypes if dtype in p.values[0].dtypes]
    ids = [f"{p.id}-{str(dtype).removeprefix('torch.')}" for p, dtype in pairs]
    return pytest.mark.parametrize(
        ("lane", argument), [(p.values[0], dtype) for p, dtype in pairs], ids=ids, indirect=["lane"]
    )


# For what has nothing to do with backends.
once = on_lanes(lambda lane: lane.backend == "eager")
# For what takes hundreds of steps.
full_speed = pytest.mark.parametrize("lane", _FULL_SPEED, indirect=True)
in_float64 = on_lanes(lambda lane: torch.float64 in lane.dtypes)

SHAPES = [(3, 5), (), (0, 2), (7,), (2, 3, 4), (1,)]


def make_params(shapes=tuple(SHAPES), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    device = torch.get_default_device()
    noise = [0.5 * torch.randn(s, generator=generator, device="cpu") + 0.1 for s in shapes]
    return [torch.nn.Parameter(x.to(device, dtype)) for x in noise]


def set_grads(params, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator, device="cpu") + 0.5
        p.grad = (g if value is None else torch.full_like(g, value)).to(p.device, p.dtype)


def train(optimizer, params, steps, start=0):
    for i in range(start, start + steps):
        set_grads(params, 1000 + i)
        optimizer.step()


def state_tensors(optimizer):
    return [x for state in optimizer.state_dict()["state"].values() for x in state.values()]


def assert_same(params, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
