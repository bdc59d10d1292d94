"""Shapes that the bypass is tested and measured on: those around layers and stacks, and awkward ones."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from zipformer_kernels.ops.cases import BATCH, Case, leaf, stacks

DIRECTIONS = "forward", "backward"
FLOPS_PER_ELEMENT = {"forward": 3, "backward": 5}


def _case(name: str, *shape: int, by_sequence: bool = False, large: bool = False) -> Case:
    """src_orig and src of `shape`, with a scale for each channel, or for each sequence and channel."""
    scales = shape[-2:] if by_sequence else shape[-1:]
    n = prod(shape)

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[torch.Tensor, ...]:
        return tuple(leaf(*size, dtype=dtype, device=device) for size in (shape, shape, scales))

    def moved(size: int) -> dict[str, int]:
        return {"forward": (3 * n + prod(scales)) * size, "backward": (5 * n + 2 * prod(scales)) * size}

    flops = {direction: n * count for direction, count in FLOPS_PER_ELEMENT.items()}
    return Case(name, inputs, moved, flops, large)


def _scale_case(
    name: str, batch: int, channels: int, skip_rate: float | None, straight_rate: float | None, large: bool = False
) -> Case:
    """The scale of each sequence, drawn at the rates that are not None."""
    n = batch * channels

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
        scale = torch.linspace(-0.1, 1.2, channels, device=device).to(dtype).requires_grad_()
        rates = skip_rate, straight_rate
        drawn = (None if rate is None else torch.rand(batch, 1, device=device, dtype=dtype) for rate in rates)
        return scale, *drawn, skip_rate or 0.0, straight_rate or 0.0, batch

    moved, flops = dict.fromkeys(DIRECTIONS, n + channels), dict.fromkeys(DIRECTIONS, 2 * n)
    return Case(name, inputs, lambda size: {key: size * count for key, count in moved.items()}, flops, large)


def _limit_case(name: str, *shape: int, large: bool = False) -> Case:
    """The gradient of a parameter of `shape` some of which is outside of its limits."""
    n = prod(shape)

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
        grad = leaf(*shape, dtype=dtype, device=device)
        return grad, torch.linspace(-1.0, 2.0, n, device=device).view(shape).to(dtype), 0.25, 0.875

    moved = flops = dict.fromkeys(DIRECTIONS, 3 * n)
    return Case(name, inputs, lambda size: {key: size * count for key, count in moved.items()}, flops, large)


def _layers(preset: str) -> list[Case]:
    """The bypass in the middle of a layer of each stack."""
    return [_case(stack.name, stack.frames, BATCH, stack.channels, large=True) for stack in stacks(preset)]


CASES = [
    _case("one element", 1, 1, 1),
    _case("no frames", 0, 3, 24),
    _case("no frames, by sequence", 0, 3, 24, by_sequence=True),
    _case("no sequences", 5, 0, 24, by_sequence=True),
    _case("one channel", 70, 2, 1),
    _case("odd sizes", 67, 3, 127),
    _case("odd sizes, by sequence", 67, 3, 127, by_sequence=True),
    _case("more channels than a block", 35, 9, 129, by_sequence=True),
    _case("S stack 0, 4 x 16 s", 796, 4, 192, large=True),
    _case("S stack 1, 4 x 16 s", 398, 4, 256, large=True),
    _case("S stack 1, 4 x 16 s, by sequence", 398, 4, 256, by_sequence=True, large=True),
    _case("S around stack 1, 4 x 16 s", 796, 4, 256, large=True),
    _case("S stack 2, 4 x 16 s, by sequence", 199, 4, 256, by_sequence=True, large=True),
    _case("L stack 3, 30 x 30 s, by sequence", 188, 30, 768, by_sequence=True, large=True),
    *_layers("L"),
]

VARIANT_CASES = {
    "scale": [
        _scale_case("skipping", 9, 127, 0.4, None),
        _scale_case("skipping or straight through", 70, 24, 0.4, 0.3),
        _scale_case("straight through", 3, 300, None, 0.5),
        _scale_case("no sequences", 0, 24, 0.4, 0.3),
        _scale_case("L stack 3, 30 x 30 s", 30, 768, 0.02, None, large=True),
    ],
    "limit": [
        _limit_case("a number"),
        _limit_case("odd sizes", 3, 127),
        _limit_case("L stack 3", 768, large=True),
    ],
}
