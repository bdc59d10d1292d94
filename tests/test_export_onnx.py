"""Conv embed and encoder written to ONNX, by torch's exporter of old, which icefall's scripts call, and by the new one.

onnxruntime runs every file on lengths and batch sizes that the exporter never saw. The models are upstream's,
converted: what is expected is what upstream gives.
"""

import copy

import onnxruntime
import pytest
import torch
import upstream
from draws import seed_all
from onnxruntime.quantization import QuantType, quantize_dynamic
from tolerances import assert_parity, rounding
from torch import nn

from zipformer_kernels import convert

# Shape checks are decided while recording, and the exporter of old says so each time.
pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

BINS = 11
CONFIG = {
    "downsampling_factor": (1, 4),
    "encoder_dim": (8, 12),
    "encoder_unmasked_dim": (8, 8),
    "num_encoder_layers": 1,
    "num_heads": (2, 1),
    "query_head_dim": 4,
    "pos_head_dim": 2,
    "value_head_dim": 3,
    "feedforward_dim": 8,
    "cnn_module_kernel": (7, 3),
    "pos_dim": 6,
}
CHUNKS = {"causal": True, "chunk_size": (8,), "left_context_frames": (16,)}
SIZES = [(11, 1), (11, 3), (14, 2), (31, 1), (48, 2), (48, 3)]  # one frame at the lower rate, and more
TOLERANCE = rounding(torch.float32, 64)


class Model(nn.Module):
    """As icefall's exporters have it, whose masks are of int32; in later torch upstream takes bools only."""

    masks = torch.int32

    def __init__(self, config):
        super().__init__()
        seed_all(0)
        self.encoder_embed = upstream.subsampling.Conv2dSubsampling(BINS, 8, 2, 3, 4)
        self.encoder = upstream.zipformer.Zipformer(**CONFIG, **config)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)

    def forward(self, x, x_lens):
        x, x_lens = self.encoder_embed(x, x_lens)
        padding = (torch.arange(x.shape[1])[None] >= x_lens[:, None]).to(self.masks)
        x, x_lens = self.encoder(x.transpose(0, 1), x_lens, padding)
        return x.transpose(0, 1), x_lens


def batch_of(frames, batch):
    seed_all(frames)
    return torch.randn(batch, frames, BINS), torch.tensor([frames, frames - 2, frames - 1][:batch])


def pair(**config):
    """A converted model, and upstream's."""
    theirs = Model(config).eval()
    ours = copy.deepcopy(theirs)
    convert(ours)
    theirs.masks = torch.bool
    return ours, theirs


def old(model, args, path, inputs, outputs, axes):
    names = {"input_names": inputs, "output_names": outputs, "dynamic_axes": axes}
    torch.onnx.export(model, args, path, dynamo=False, opset_version=13, **names)


def export_old(model, path):
    axes = {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}, "y": {0: "N", 1: "T"}, "y_lens": {0: "N"}}
    old(model, batch_of(35, 2), path, ["x", "x_lens"], ["y", "y_lens"], axes)


def export_new(model, path):
    batch, frames = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("frames", min=11, max=4096)
    shapes = {0: batch, 1: frames}, {0: batch}
    torch.onnx.export(model, batch_of(35, 2), dynamo=True, verbose=False, dynamic_shapes=shapes).save(path)


def run(path, *args):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {item.name: value.numpy() for item, value in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


@pytest.mark.parametrize("config", [{}, CHUNKS], ids=["offline", "chunks"])
@pytest.mark.parametrize("export", [export_old, export_new])
def test_every_length_and_batch_size(export, config, tmp_path):
    ours, theirs = pair(**config)
    path = str(tmp_path / "model.onnx")
    export(ours, path)
    for size in SIZES:
        args = batch_of(*size)
        with torch.no_grad():
            expected = theirs(*args)
        for actual, wanted in zip(run(path, *args), expected, strict=True):
            assert_parity(actual, wanted, TOLERANCE, f"{size}")
    if export is export_old and not config:
        quantized = str(tmp_path / "int8.onnx")
        quantize_dynamic(path, quantized, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
        assert_parity(run(quantized, *args)[0], expected[0], 0.2, "int8")


class Streaming(nn.Module):
    """One chunk, with an argument for each state, and one that says how many frames have gone before."""

    def __init__(self, encoder, masks):
        super().__init__()
        self.encoder, self.masks = encoder, masks

    def forward(self, x, gone, *states):
        context, (frames, batch, _) = self.encoder.left_context_frames[0], x.shape
        missing = torch.arange(context - 1, -1, -1)[None] >= gone[:, None]
        padding = torch.cat([missing, torch.zeros(batch, frames, dtype=torch.bool)], 1).to(self.masks)
        y, _, states = self.encoder.streaming_forward(x, torch.full((batch,), frames), list(states), padding)
        return (y, gone + frames, *states)


def batch_dim(i):
    """Of state i: x, keys and values are time-major."""
    return 0 if i % 6 >= 4 else 1


def export_stream_old(model, args, path):
    names = [f"state{i}" for i in range(len(args) - 2)]
    axes = {"x": {1: "N"}, "gone": {0: "N"}} | {name: {batch_dim(i): "N"} for i, name in enumerate(names)}
    axes |= {"y": {1: "N"}, "gone after": {0: "N"}} | {f"{name} after": axes[name] for name in names}
    old(model, args, path, ["x", "gone", *names], ["y", "gone after", *(f"{name} after" for name in names)], axes)


def export_stream_new(model, args, path):
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {1: batch}, {0: batch}, tuple({batch_dim(i): batch} for i in range(len(args) - 2))
    torch.onnx.export(model, args, dynamo=True, verbose=False, dynamic_shapes=shapes).save(path)


@pytest.mark.parametrize("export", [export_stream_old, export_stream_new])
def test_a_stream_of_every_batch_size(export, tmp_path):
    ours, theirs = pair(**CHUNKS)
    ours, theirs = Streaming(ours.encoder, torch.int32), Streaming(theirs.encoder, torch.bool)
    path = str(tmp_path / "chunk.onnx")
    export(ours, (torch.randn(8, 2, 8), torch.zeros(2).long(), *theirs.encoder.get_init_states(2)), path)
    for batch in (1, 2, 3):
        states = expected = torch.zeros(batch).long(), *theirs.encoder.get_init_states(batch)
        for chunk in range(4):
            x = torch.randn(8, batch, 8)
            actual, *states = run(path, x, *states)
            with torch.no_grad():
                wanted, *expected = theirs(x, *expected)
            assert_parity(actual, wanted, TOLERANCE, f"chunk {chunk} of {batch} streams")
