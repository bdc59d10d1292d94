"""What the CPU's and CUDA's launchers of the gates share: rows as the compiled module takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zipformer_kernels.core.launch import pointer


class Rows(NamedTuple):
    """`NonlinRows` of ``csrc/nonlin_attention/nonlin_attention.h``."""

    data: int
    frame: int
    sequence: int


NO_ROWS = Rows(0, 0, 0)


def rows(x: Tensor) -> Rows:
    """A tensor (T, batch, channels) with channels of stride 1, for kernels."""
    return Rows(pointer(x), *x.stride()[:2])
