"""Encoder and conv embed recorded in eval mode, by every recorder of torch, and run at another length.

Recorders see the reference path, plain PyTorch, so what they write runs without this package. torch.jit.script is not
among them: see tests/test_script.py. ONNX has tests/test_export_onnx.py.
"""

import contextlib
import random

import pytest
import torch
from test_encoder_upstream import CONFIG, batch
from test_export_onnx import CHUNKS, TOLERANCE, batch_of, pair
from tolerances import PARITY, assert_agrees, assert_parity
from torch.fx.experimental import _config as export_config

from zipformer_kernels.modules import Conv2dSubsampling
from zipformer_kernels.modules.encoder import Zipformer

# Shape checks are decided while recording, and jit.trace says so each time.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")

FRAMES = torch.export.Dim.AUTO  # torch 2.7 cannot prove what a range given by hand asks for
SHAPES = ({0: FRAMES}, {}, {1: FRAMES})


@pytest.fixture(scope="module")
def model():
    """With parameters that want gradients: recording alone must switch Balancer and Whiten off."""
    return Zipformer(**CONFIG).eval()


@pytest.fixture(scope="module")
def batches():
    return [batch(CONFIG, lengths, torch.float32) for lengths in ([30, 21], [45, 40])]


def assert_same(program, model, batches):
    for args in batches:
        for actual, expected in zip(program(*args), model(*args), strict=True):
            assert_agrees(actual, expected, PARITY[torch.float32])


@contextlib.contextmanager
def no_draws():
    """Recording, unlike running, draws no number."""
    state = random.getstate()
    yield
    assert random.getstate() == state


def test_export(model, batches):
    with no_draws():
        exported = torch.export.export(model, tuple(batches[0]), dynamic_shapes=SHAPES, strict=False)
    assert_same(exported.module(), model, batches)


def test_compile_without_graph_breaks(model, batches):
    """Capture only: the compiler behind it is not what is tested."""
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with no_draws():
        compiled(*batches[0])
    assert_same(compiled, model, batches)


def test_jit_trace(model, batches):
    with no_draws():
        traced = torch.jit.trace(model, tuple(batches[0]), check_trace=False)
    assert_same(traced, model, batches)


def test_export_of_the_conv_embed():
    embed = Conv2dSubsampling(20, 12, 4, 8, 6).eval()
    batches = [(torch.randn(2, frames, 20), torch.tensor([frames, 20])) for frames in (40, 61)]
    exported = torch.export.export(embed, batches[0], dynamic_shapes=({1: FRAMES}, {}), strict=False)
    assert_same(exported.module(), embed, batches)


@pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="torch 2.7 cannot prove that all lengths of a range fit; 2.13 can"
)
@pytest.mark.parametrize(("config", "shortest"), [(CHUNKS, 13), ({}, 9)], ids=["two frames out", "one frame out"])
def test_export_of_all_lengths_and_batch_sizes(config, shortest):
    """Of what leaves at least two frames for what is not ours; of all, where torch.export takes 1 as other sizes."""
    ours, theirs = pair(**config)
    sizes = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("frames", min=shortest, max=4096)
    shapes = dict(enumerate(sizes)), {0: sizes[0]}
    with export_config.patch(backed_size_oblivious=shortest == 9):
        program = torch.export.export(ours, batch_of(45, 2), dynamic_shapes=shapes, strict=False).module()
    for frames in (*range(shortest, 18), 31, 64):
        for size in (1, 2, 3):
            args = batch_of(frames, size)
            with torch.no_grad():
                results = zip(program(*args), theirs(*args), strict=True)
            for actual, expected in results:
                assert_parity(actual, expected, TOLERANCE, f"{frames} frames of {size}")


class Streaming(torch.nn.Module):
    """`streaming_forward` as a forward, with one argument for each state."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, x_lens, padding, *states):
        y, lengths, states = self.encoder.streaming_forward(x, x_lens, list(states), padding)
        return (y, lengths, *states)


@pytest.mark.parametrize("recorder", ["export", "trace"])
def test_streaming(recorder):
    encoder = Zipformer(**CONFIG, causal=True, chunk_size=(8,), left_context_frames=(16,)).eval()
    streaming = Streaming(encoder)
    args = (
        torch.randn(8, 2, 16),
        torch.tensor([8, 8]),
        torch.zeros(2, 24).bool(),
        *encoder.get_init_states(2),
    )
    if recorder == "export":
        program = torch.export.export(streaming, args, strict=False).module()
    else:
        program = torch.jit.trace(streaming, args, check_trace=False)
    assert_same(program, streaming, [args, (args[0] + 1, args[1], args[2], *streaming(*args)[2:])])
