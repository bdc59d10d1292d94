"""Shapes that the Balancer's gradient is tested and measured on: those of a model's modules, and awkward ones.

What the op computes is a gradient. Of its arguments only `grad` requires one, for gradients of gradients.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from zipformer_kernels.ops.cases import Case, leaf, normal

LIMITS = -0.2, 0.3, 0.5, 0.9, 0.04
FLOPS = {"moments": 6, "change": 5}  # of an element


def _features(shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Channels whose means and sizes lie on either side of the limits."""
    x = normal(*shape, dtype=torch.float32, device=device).movedim(channel_dim, -1)
    channels = x.shape[-1]
    size, mean = torch.linspace(0.1, 3.0, channels), torch.linspace(-1.0, 1.0, channels)
    return (x * size.to(device) + mean.to(device)).movedim(-1, channel_dim).to(dtype)


def _case(name: str, *shape: int, channel_dim: int = -1, part: bool = False, large: bool = False) -> Case:
    """The gradient of features of `shape`, or of a part of larger ones whose moments are known."""
    n, channels = prod(shape), shape[channel_dim]

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
        grad = leaf(*shape, dtype=dtype, device=device)
        x = _features(shape, channel_dim, dtype, device)
        wide, known = torch.promote_types(dtype, torch.float32), (None, None)
        if part:
            known = (torch.linspace(start, 2.0, channels, dtype=wide, device=device) for start in (0.01, -2.0))
        return grad, x, *known, channel_dim, *LIMITS

    def moved(size: int) -> dict[str, int]:
        return {"forward": 3 * n * size}

    flops = FLOPS["change"] + (0 if part else FLOPS["moments"])
    return Case(name, inputs, moved, {"forward": n * flops}, large)


def _moments_case(name: str, *shape: int, channel_dim: int = -1, large: bool = False) -> Case:
    """The moments of features of `shape`."""
    n = prod(shape)

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
        return _features(shape, channel_dim, dtype, device), channel_dim

    flops = {"forward": n * FLOPS["moments"]}
    return Case(name, inputs, lambda size: {"forward": n * size + 8 * shape[channel_dim]}, flops, large)


CASES = [
    _case("one element", 1, 1, 1),
    _case("no frames", 0, 3, 24),
    _case("one frame", 1, 3, 7),
    _case("one channel", 70, 2, 1),
    _case("odd sizes", 67, 3, 127),
    _case("odd sizes, channels before frames", 3, 37, 67, channel_dim=1),
    _case("few, of a part", 5, 3, 4, part=True),
    _case("image", 2, 7, 19, 5, channel_dim=1),
    _case("more channels than a block", 35, 3, 259),
    _case("more rows than a group", 131, 2, 5, part=True),
    _case("S stack 0, 4 x 16 s", 796, 4, 192, large=True),
    _case("S stack 0, feed-forward, 4 x 16 s", 796, 4, 512, large=True),
    _case("ConvNeXt, a part of 4 x 16 s", 4096, 384, part=True, large=True),
    _case("L stack 3, 30 x 30 s", 188, 30, 768, large=True),
]

VARIANT_CASES = {
    "moments": [
        _moments_case("one element", 1, 1),
        _moments_case("odd sizes", 67, 3, 127),
        _moments_case("odd sizes, channels before frames", 3, 37, 67, channel_dim=1),
        _moments_case("more channels than a block", 135, 259),
        _moments_case("ConvNeXt, a part of 4 x 16 s", 4096, 384, large=True),
    ]
}
