"""Shapes that depthwise_conv2d is tested and measured on: the conv embed's, and awkward ones."""

from __future__ import annotations

import torch

from zipformer_kernels.ops.cases import Case, leaf


def _case(
    name: str,
    batch: int,
    channels: int,
    frames: int,
    bins: int,
    kernel: tuple[int, int],
    *,
    bias: bool = True,
    large: bool = False,
) -> Case:
    """x has its channels last in memory, as in the module."""
    taps = kernel[0] * kernel[1]
    n = batch * channels * frames * bins

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        x = leaf(batch, frames, bins, channels, dtype=dtype, device=device).detach().permute(0, 3, 1, 2)
        weight = leaf(channels, 1, *kernel, dtype=dtype, device=device, scale=taps**-0.5)
        b = leaf(channels, dtype=dtype, device=device) if bias else None
        return x.requires_grad_(), weight, b

    def moved(size: int) -> dict[str, int]:
        parameters = channels * (taps + bias) * size
        return {"forward": 2 * n * size + parameters, "backward": 3 * n * size + 2 * parameters}

    return Case(name, inputs, moved, {"forward": 2 * n * taps, "backward": 4 * n * taps}, large)


CASES = [
    _case("one element", 1, 1, 1, 1, (1, 1)),
    _case("no frames", 2, 8, 0, 19, (7, 7)),
    _case("odd sizes", 2, 17, 13, 5, (3, 5)),
    _case("smaller than the kernel", 3, 24, 2, 3, (7, 7)),
    _case("one channel, no bias", 2, 1, 20, 19, (7, 7), bias=False),
    _case("conv embed, one frame", 1, 128, 1, 19, (7, 7)),
    _case("conv embed, short", 2, 128, 35, 19, (7, 7)),
    _case("more taps than sums in registers", 1, 8, 18, 21, (3, 11)),
    _case("conv embed, 4 x 16 s", 4, 128, 799, 19, (7, 7), large=True),
    _case("conv embed, 30 s x 30", 30, 128, 1497, 19, (7, 7), large=True),
]
