"""Converts a model built from upstream's classes, in place, and times it before and after.

The model is upstream's own, from the package `zipformer` on PyPI, with random weights:
``pip install --no-deps zipformer==0.1.3`` brings it. In a recipe the one line is ``convert(model)``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import time
import types

import torch
from torch import Tensor, nn

import zipformer_kernels
from zipformer_kernels.presets import FBANK_BINS, PRESETS


class Model(nn.Module):
    """A conv embed and an encoder, as a recipe's model holds them."""

    def __init__(self, size: str) -> None:
        super().__init__()
        subsampling, zipformer = upstream("subsampling", "zipformer")
        self.encoder_embed = subsampling.Conv2dSubsampling(FBANK_BINS, PRESETS[size]["encoder_dim"][0])
        self.encoder = zipformer.Zipformer(**PRESETS[size])

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x, lengths = self.encoder_embed(features, lengths)
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        return self.encoder(x.transpose(0, 1), lengths, padding)


def upstream(*names: str) -> list[types.ModuleType]:
    """Modules of the package `zipformer`, without the packages for audio and training that its first file imports."""
    os.environ.setdefault("K2_ONNX_EXPORT", "1")  # calls upstream's activations; it compiles them else, for a minute
    if "zipformer" not in sys.modules:
        spec = importlib.util.find_spec("zipformer")
        if spec is None:
            raise SystemExit("upstream is not installed: pip install --no-deps zipformer==0.1.3")
        package, utils = types.ModuleType("zipformer"), types.ModuleType("zipformer.utils")
        package.__path__ = list(spec.submodule_search_locations)
        utils.torch_autocast = lambda device_type="cuda", **settings: torch.amp.autocast(device_type, **settings)
        sys.modules |= {"zipformer": package, "zipformer.utils": utils}
    return [importlib.import_module(f"zipformer.modules.{name}") for name in names]


@torch.inference_mode()
def milliseconds(model: nn.Module, batch: tuple[Tensor, Tensor], runs: int) -> float:
    """The median time of one pass, after one that is not counted."""
    model(*batch)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        model(*batch)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="S", help="of the published model")
    parser.add_argument("--seconds", type=float, default=8.0, help="of audio in each of the two sequences")
    parser.add_argument("--runs", type=int, default=3, help="passes that are timed")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Model(options.size).eval()
    frames = int(100 * options.seconds)
    batch = torch.randn(2, frames, FBANK_BINS), torch.tensor([frames, frames // 2])

    before = milliseconds(model, batch, options.runs)
    report = zipformer_kernels.convert(model, check=batch)
    after = milliseconds(model, batch, options.runs)
    print(report)
    print(f"a pass took {before:.0f} ms, and takes {after:.0f} ms now: {before / after:.2f} times as fast")


if __name__ == "__main__":
    main()
