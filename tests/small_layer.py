"""One layer and its input, small, for tests of what is put around it."""

import contextlib

import pytest
import torch
from draws import generators, seed_all, set_batch_count
from lanes import Lane
from tolerances import rounding

from zipformer_kernels.core import backend
from zipformer_kernels.modules import CompactRelPositionalEncoding, ZipformerEncoderLayer

FRAMES, BATCH, CHANNELS = 12, 2, 16
LENGTHS = FRAMES, 9

compiled_lanes = pytest.mark.parametrize("lane", ["eager", "cpu"])
all_lanes = pytest.mark.parametrize("lane", backend.BACKENDS)


@pytest.fixture(autouse=True)
def on_lane(request):
    """Ops that have no kernels on the test's backend run eagerly."""
    torch._dynamo.reset()
    lane = lane_of(request)
    with contextlib.nullcontext() if lane is None else lane.active():
        yield


def lane_of(request):
    """The lane of a test, or None where it has none."""
    name = request.node.callspec.params.get("lane") if hasattr(request.node, "callspec") else None
    return None if name is None else Lane(name)


def device_of(request):
    """Where a test's layer and inputs are: where its lane runs."""
    lane = lane_of(request)
    return torch.device("cpu") if lane is None else lane.device


def padding(x):
    """The mask of padding of the inputs, on the device of x."""
    return torch.arange(FRAMES, device=x.device) >= torch.tensor(LENGTHS, device=x.device).unsqueeze(1)


@pytest.fixture(name="layer")
def fixture_of_layer(request):
    seed_all(0)
    layer = ZipformerEncoderLayer(CHANNELS, 8, 4, 8, 4, 4, 24, cnn_module_kernel=7)
    set_batch_count(layer, 500.0)  # where everything that is drawn is drawn often
    return layer.to(device_of(request)).train()


@pytest.fixture(name="inputs")
def fixture_of_inputs(request):
    seed_all(1)
    x = torch.randn(FRAMES, BATCH, CHANNELS).to(device_of(request))
    return x, CompactRelPositionalEncoding(8, 0.0)(x)


def run(function, layer, inputs, seed=0, dtype=torch.float32):
    """The output and all gradients by name, and the states of the generators afterwards."""
    x = inputs[0].clone().requires_grad_()
    layer.zero_grad()
    seed_all(seed)
    y = function(x, inputs[1], src_key_padding_mask=padding(x))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "x": x.grad} | grads, generators()


def assert_close(actual, expected, tolerance=None):
    """By default, equal but for a few roundings of float32."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        size = max(wanted.abs().max().item(), 1e-3)
        error = (actual[name] - wanted).abs().max().item() / size
        assert error <= (tolerance or rounding(torch.float32, FRAMES * CHANNELS)), f"{name}: off by {error:.1e}"
