"""Shapes that the bypass around a slower stack is tested and measured on: those of preset L, and awkward ones."""

from __future__ import annotations

from typing import Any

import torch

from zipformer_kernels.ops.cases import BATCH, FRAMES, Case, leaf, stacks

FLOPS_PER_ELEMENT = {"forward": 3, "backward": 5}


def _case(
    name: str, frames: int, batch: int, channels: int, factor: int, narrower: int = 0, masked: bool = False,
    by_sequence: bool = False, large: bool = False,
) -> Case:  # fmt: skip
    """`frames` at the full rate, of which what went in has `narrower` channels less."""
    n, length = frames * batch * channels, -(-frames // factor)
    orig, m = frames * batch * (channels - narrower), length * batch * channels
    scales = (batch, channels) if by_sequence else (channels,)
    shapes = (frames, batch, channels - narrower), (length, batch, channels), scales

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
        tensors = (leaf(*shape, dtype=dtype, device=device) for shape in shapes)
        mask = torch.arange(batch * channels, device=device).reshape(batch, -1) % 3 > 0 if masked else None
        return *tensors, mask, factor

    def moved(size: int) -> dict[str, int]:
        sums = channels * (batch if by_sequence else 1)
        return {"forward": (n + orig + m + sums) * size, "backward": (n + 2 * orig + 2 * m + 2 * sums) * size}

    return Case(name, inputs, moved, {way: n * count for way, count in FLOPS_PER_ELEMENT.items()}, large)


CASES = [
    _case("one element", 1, 1, 1, 1),
    _case("one frame", 1, 2, 5, 4),
    _case("no frames", 0, 2, 5, 2),
    _case("no sequences", 4, 0, 5, 2, by_sequence=True),
    _case("odd sizes", 35, 3, 7, 2),
    _case("all divides, by sequence", 24, 2, 16, 8, by_sequence=True),
    _case("more channels than a block", 37, 2, 150, 3),
    _case("narrower, masked", 22, 3, 137, 4, narrower=70, masked=True),
    *(
        _case(
            f"around {stack.name}", FRAMES, BATCH, stack.channels, stack.downsampling,
            narrower=stack.channels - before.channels, masked=True, large=True,
        )
        for before, stack in zip(stacks("L")[:3], stacks("L")[1:4], strict=True)
    ),
]  # fmt: skip
