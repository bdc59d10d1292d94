"""Matrix products of rows in Triton: one launch for each, `zipformer_kernels.branch.products.kernels`.

Gradients of weights are PyTorch's own products: nothing follows them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.branch.products.interface import Products
from zipformer_kernels.branch.products.kernels import (
    activated_gradient_kernel,
    activated_kernel,
    added_kernel,
    lowered_kernel,
)
from zipformer_kernels.branch.products.plain import total, weight_gradient
from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import cdiv, on_device
from zipformer_kernels.ops.swoosh.reference import OFFSET, SHIFT

TILE = tuning.entry("products.triton_tile")
LOWERED = tuning.entry("products.triton_lowered")


class _Tiles:
    """How a product is cut up.

    Attributes:
        grid: of the launch.
        sizes: rows, sequences, channels of the result and of the operand, and the weight's strides of these two.
        constants: those of the kernel.
        parts: into which sums over rows are parted.
    """

    def __init__(self, x: Tensor, weight: Tensor, n: int) -> None:
        """weight has dimension n for the result's channels."""
        bm, bn, bk, warps, stages = TILE.value
        rows, out, channels = x.shape[0] * x.shape[1], weight.shape[n], weight.shape[1 - n]
        self.parts = cdiv(rows, bm)
        self.grid = (self.parts * cdiv(out, bn),)
        self.sizes = rows, x.shape[1], out, channels, weight.stride(n), weight.stride(1 - n)
        self.constants = {
            "WHOLE_N": out % bn == 0,
            "WHOLE_K": channels % bk == 0,
            "BM": bm,
            "BN": bn,
            "BK": bk,
            "num_warps": warps,
            "num_stages": 2 if torch.version.hip else stages,
        }

    def sums(self, x: Tensor) -> Tensor:
        """Room for sums over rows of the result."""
        return x.new_empty(self.parts, self.sizes[2], dtype=torch.float32)


def _activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, kind: str, stores: bool
) -> tuple[Tensor | None, Tensor]:
    tiles = _Tiles(x, weight, 0)
    a = x.new_empty(*x.shape[:2], weight.shape[0])
    hidden = torch.empty_like(a) if stores else None
    if a.numel() > 0:
        with on_device(x):
            activated_kernel[tiles.grid](
                x, weight, bias, mask, hidden, a, *tiles.sizes, SHIFT[kind], OFFSET[kind], **tiles.constants
            )
    return hidden, a


def _activated_gradient(
    grad: Tensor, weight: Tensor, hidden: Tensor, mask: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _Tiles(grad, weight, 1)
    dhidden, a, sums = torch.empty_like(hidden), torch.empty_like(hidden), tiles.sums(grad)
    if a.numel() > 0:
        with on_device(grad):
            activated_gradient_kernel[tiles.grid](
                grad, weight, hidden, mask, dhidden, a, sums, *tiles.sizes, SHIFT[kind], OFFSET[kind], **tiles.constants
            )
    return dhidden, a, sums


def _added(
    src: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _sum(_Tiles(x, weight, 0), src, x, weight, bias, chosen, low, None)


def _added_gradient(grad: Tensor, dhidden: Tensor, weight: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _Tiles(dhidden, weight, 1)
    sums = tiles.sums(grad)
    return *_sum(tiles, grad, dhidden, weight, None, None, low, sums), sums


def _sum(
    tiles: _Tiles,
    src: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    low: torch.dtype,
    sums: Tensor | None,
) -> tuple[Tensor, Tensor]:
    src = src.contiguous()
    y = torch.empty_like(src)
    y_low = None if src.dtype == low else torch.empty_like(src, dtype=low)
    if y.numel() > 0:
        with on_device(src):
            added_kernel[tiles.grid](src, x, weight, bias, chosen, y, y_low, sums, *tiles.sizes, **tiles.constants)
    return y, y if y_low is None else y_low


def _lowered(grad: Tensor, chosen: Tensor | None, low: torch.dtype) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    bm, bn, warps = LOWERED.value
    frames, sequences, channels = grad.shape
    parts = cdiv(frames * sequences, bm)
    lowered = None if chosen is None and grad.dtype == low else torch.empty_like(grad, dtype=low)
    sums = grad.new_empty(parts, channels, dtype=torch.float32)
    if grad.numel() > 0:
        grid = (parts * cdiv(channels, bn),)
        with on_device(grad):
            lowered_kernel[grid](
                grad, chosen, lowered, sums, frames * sequences, sequences, channels, BM=bm, BN=bn, num_warps=warps
            )
    return grad if lowered is None else lowered, sums


TRITON = Products(_activated, _activated_gradient, _added, _added_gradient, weight_gradient, _lowered, total)
