"""Shapes that downsampling is tested and measured on: those in front of stacks and of the output, and awkward ones."""

from __future__ import annotations

from typing import Any

import torch

from zipformer_kernels.ops.cases import BATCH, FRAMES, Case, leaf, stacks

FLOPS_PER_ELEMENT = {"forward": 2, "backward": 3}  # of what is read


def _case(
    name: str, frames: int, batch: int, channels: int, factor: int, wider: int = 0, masked: bool = False,
    large: bool = False,
) -> Case:  # fmt: skip
    """`frames` of `channels` to a lower rate, with `wider` channels more."""
    n, length = frames * batch * channels, -(-frames // factor)
    m = length * batch * (channels + wider)

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[Any, ...]:
        src, bias = (leaf(*shape, dtype=dtype, device=device) for shape in ((frames, batch, channels), (factor,)))
        mask = torch.arange(batch * (channels + wider), device=device).reshape(batch, -1) % 3 > 0 if masked else None
        return src, bias, mask, channels + wider

    def moved(size: int) -> dict[str, int]:
        return {"forward": (n + m + factor) * size, "backward": (2 * n + m + 2 * factor) * size}

    return Case(name, inputs, moved, {way: n * count for way, count in FLOPS_PER_ELEMENT.items()}, large)


_PAIRS = [(before, stack) for before, stack in zip(stacks("L"), stacks("L")[1:], strict=False)][:3]

CASES = [
    _case("one element", 1, 1, 1, 1),
    _case("one frame", 1, 2, 5, 4),
    _case("no frames", 0, 2, 5, 2),
    _case("no sequences", 4, 0, 5, 2),
    _case("odd sizes", 35, 3, 7, 2),
    _case("all divides", 24, 2, 16, 8),
    _case("more channels than a block", 37, 2, 150, 3),
    _case("wider, masked", 22, 3, 67, 4, wider=70, masked=True),
    *(
        _case(
            f"into {stack.name}", FRAMES, BATCH, before.channels, stack.downsampling,
            wider=stack.channels - before.channels, masked=True, large=True,
        )
        for before, stack in _PAIRS
    ),
    _case(f"output of L, {BATCH} x 30 s", FRAMES, BATCH, 768, 2, large=True),
]  # fmt: skip
