"""Writes a model to ONNX, and runs the file with onnxruntime on lengths that the exporter never saw.

The file holds plain operators only, so that whoever runs it needs neither this package nor torch.
``pip install onnx onnxruntime`` brings what this needs.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from zipformer_kernels import Conv2dSubsampling, Zipformer, load_checkpoint
from zipformer_kernels.presets import FBANK_BINS, PRESETS


class Model(nn.Module):
    """Filterbank features (batch, frames, bins) and lengths to embeddings (batch, frames, channels) and lengths."""

    def __init__(self, embed: Conv2dSubsampling, encoder: Zipformer) -> None:
        super().__init__()
        self.embed, self.encoder = embed, encoder

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x, lengths = self.embed(features, lengths)
        padding = torch.arange(x.shape[1])[None] >= lengths[:, None]
        x, lengths = self.encoder(x.transpose(0, 1), lengths, padding)
        return x.transpose(0, 1), lengths


def example(frames: int, batch: int) -> tuple[Tensor, Tensor]:
    """Arguments of the model; the last sequence is shorter than the others."""
    lengths = torch.full((batch,), frames)
    lengths[-1] -= 9 * (batch > 1)
    return torch.randn(batch, frames, FBANK_BINS), lengths


def export(model: nn.Module, path: Path) -> None:
    """Writes the file, for every length and batch size."""
    axes = {"features": {0: "batch", 1: "frames"}, "lengths": {0: "batch"}}
    axes |= {"embeddings": {0: "batch", 1: "embedded"}, "embedding_lengths": {0: "batch"}}
    names = {"input_names": list(axes)[:2], "output_names": list(axes)[2:]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks of arguments are decided while it is recorded, which torch tells of
        torch.onnx.export(model, example(64, 2), str(path), dynamo=False, opset_version=13, dynamic_axes=axes, **names)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="icefall's .pt, a state_dict, or .safetensors")
    parser.add_argument("--size", choices=PRESETS, default="S", help="of the random model")
    parser.add_argument("--output", type=Path, help="the file; by default one that is deleted again")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    if options.checkpoint is not None:
        parts = load_checkpoint(options.checkpoint)
    else:
        parts = Conv2dSubsampling.from_preset(options.size), Zipformer.from_preset(options.size)
    model = Model(*parts).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = options.output or Path(folder) / "encoder.onnx"
        export(model, path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
        for frames, batch in ((40, 1), (300, 3)):
            features, lengths = example(frames, batch)
            feed = {"features": features.numpy(), "lengths": lengths.numpy()}
            theirs = torch.from_numpy(session.run(None, feed)[0])
            with torch.inference_mode():
                ours, _ = model(features, lengths)
            error = (theirs - ours).abs().max() / ours.square().mean().sqrt()
            print(f"{batch} x {frames} frames: onnxruntime differs by {error:.0e} of the embeddings' RMS")


if __name__ == "__main__":
    main()
