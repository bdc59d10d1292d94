"""Shapes that the bypass is tested and measured on: those around layers and stacks, and awkward ones."""

from __future__ import annotations

from math import prod

import torch

from zipformer_kernels.ops.cases import Case, leaf

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
]
