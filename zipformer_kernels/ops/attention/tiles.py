"""How the Triton kernels of attention are cut up."""

from __future__ import annotations

from typing import NamedTuple

import torch

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import cdiv, next_power_of_2


class Tile(NamedTuple):
    """A kernel's share of the scores that it has at a time, and what it gets of a multiprocessor.

    Attributes:
        targets, sources: rows and columns of scores. A program owns the rows of one and walks over those of the other.
        warps: warps of a program.
        channels: value channels at a time, at most: a power of two, or two of them.
        stages: how many steps of the walk are loaded ahead, where the compiler can.
    """

    targets: int
    sources: int
    warps: int
    channels: int
    stages: int = 3

    def shares(self, channels: int) -> tuple[int, dict[str, int]]:
        """How many programs share out value channels, and the constants of one: its BC + REST channels.

        Both are powers of two of 16 or more, or REST is 0. Few widths, for each is another kernel: a power of two, or
        `channels` at a time.
        """
        largest = next_power_of_2(self.channels + 1) // 2
        if channels <= largest:
            return 1, {"BC": max(16, next_power_of_2(channels)), "REST": 0}
        return cdiv(channels, self.channels), {"BC": largest, "REST": self.channels - largest}

    def block(self, channels: int) -> int:
        """Value channels per tile: all of a narrow head, at least the 16 of a matrix instruction."""
        return min(max(16, next_power_of_2(channels)), self.channels)

    def blocks(self) -> dict[str, int]:
        """The constants of a kernel that are rows and columns of a tile."""
        return {"BM": self.targets, "BN": self.sources}

    def options(self) -> dict[str, int]:
        """The options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


TILES = {
    (kernel, size): tuning.entry(f"attention.triton_{kernel}_{size}_bytes")
    for kernel in (
        "softmax",
        "masked_softmax",
        "weights",
        "aggregate",
        "wide_aggregate",
        "value",
        "masked_value",
        "score",
        "gather",
        "key",
        "position",
        "pack",
    )
    for size in (2, 4)
}
"""Their entries by kernel and bytes of an element, read at every launch.

With masks for pairs the kernels `softmax` and `value` have tiles of their own, `value` also for wide heads, for in the
others they would spill. Chosen from machine code for sm_90 (docs/kernels.md): none spills, and at least two programs
share a multiprocessor.
"""


def tile_of(kernel: str, dtype: torch.dtype) -> Tile:
    """The tile of a kernel for elements of a dtype."""
    return Tile(*TILES[kernel, dtype.itemsize].value)
