"""Matrix products of rows in Triton: one launch for each, `zipformer_kernels.branch.products.kernels`.

Gradients of weights are PyTorch's own products: nothing follows them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.branch.products.interface import Dropout, Products
from zipformer_kernels.branch.products.kernels import (
    activated_gradient_kernel,
    activated_kernel,
    added_kernel,
    lowered_kernel,
    totals_kernel,
)
from zipformer_kernels.branch.products.plain import weight_gradient
from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import cdiv, contiguous, on_device
from zipformer_kernels.ops.swoosh.reference import OFFSET, SHIFT

TILE = tuning.entry("products.triton_tile")
GRADIENT = tuning.entry("products.triton_gradient_tile")
NARROW = tuning.entry("products.triton_narrow_tile")
TOTALS = tuning.entry("products.triton_totals_tile")
LOWERED = tuning.entry("products.triton_lowered_tile")


@lru_cache(maxsize=1024)
def _cut(channels: int, inner: int, wide: tuple[int, ...], narrow: tuple[int, ...]) -> tuple[int, int, dict[str, Any]]:
    """How a product with so many channels, of operands with `inner`, is cut up: rows of a tile, tiles that lie beside
    each other, and the constants of kernels. Narrow tiles are taken where a quarter of wide ones would lie idle.
    """
    idle = 4 * cdiv(channels, wide[1]) * wide[1] > 5 * cdiv(channels, narrow[1]) * narrow[1]
    bm, bn, bk, warps, stages = narrow if idle else wide
    whole = {"WHOLE_N": channels % bn == 0, "WHOLE_K": inner % bk == 0}
    return bm, cdiv(channels, bn), whole | {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}


def _drawn(dropout: Dropout | None) -> tuple[Tensor | None, float, float]:
    """The draws, the rate as torch compares them with it, and the factor of what is not dropped."""
    if dropout is None:
        return None, 0.0, 1.0
    return dropout.draws.contiguous(), _rounded(dropout.rate, dropout.draws.dtype), dropout.factor


@lru_cache(maxsize=1024)
def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=dtype).item()


def _activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, dropout: Dropout | None, kind: str, stores: bool
) -> tuple[Tensor | None, Tensor]:
    x, bias = contiguous(x, bias)
    (frames, sequences, inner), channels = x.shape, weight.shape[0]
    a = x.new_empty(frames, sequences, channels)
    hidden = torch.empty_like(a) if stores else None
    bm, across, constants = _cut(channels, inner, TILE.value, NARROW.value)
    rows = frames * sequences
    if rows > 0:
        with on_device(x):
            activated_kernel[(cdiv(rows, bm) * across,)](
                x, weight, bias, *_drawn(dropout), hidden, a, rows, sequences, channels, inner, *weight.stride(),
                SHIFT[kind], OFFSET[kind], **constants,
            )  # fmt: skip
    return hidden, a


def _activated_gradient(
    grad: Tensor, weight: Tensor, hidden: Tensor, dropout: Dropout | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad, hidden = contiguous(grad, hidden)
    (frames, sequences, inner), channels = grad.shape, weight.shape[1]
    bm, across, constants = _cut(channels, inner, GRADIENT.value, NARROW.value)
    rows = frames * sequences
    parts = cdiv(rows, bm)
    dhidden, a = torch.empty_like(hidden), torch.empty_like(hidden)
    sums = torch.empty(parts, channels, dtype=torch.float32, device=grad.device)
    if rows > 0:
        w_sk, w_sn = weight.stride()
        with on_device(grad):
            activated_gradient_kernel[(parts * across,)](
                grad, weight, hidden, *_drawn(dropout), dhidden, a, sums, rows, sequences, channels, inner, w_sn, w_sk,
                SHIFT[kind], OFFSET[kind], **constants,
            )  # fmt: skip
    return dhidden, a, sums


def _added(
    src: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    src, x, bias, chosen = contiguous(src, x, bias, chosen)
    return _sum(src, x, weight, *weight.stride(), bias, chosen, low, False)[:2]


def _added_gradient(grad: Tensor, dhidden: Tensor, weight: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    grad, dhidden = contiguous(grad, dhidden)
    return _sum(grad, dhidden, weight, weight.stride(1), weight.stride(0), None, None, low, True)


def _sum(
    src: Tensor,
    x: Tensor,
    weight: Tensor,
    w_sn: int,
    w_sk: int,
    bias: Tensor | None,
    chosen: Tensor | None,
    low: torch.dtype,
    sums_up: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """src plus a product, in its dtype and in `low`, and its sums if they are wanted."""
    frames, sequences, channels = src.shape
    bm, across, constants = _cut(channels, x.shape[2], TILE.value, NARROW.value)
    rows = frames * sequences
    parts = cdiv(rows, bm)
    y = torch.empty_like(src)
    y_low = None if src.dtype == low else torch.empty_like(src, dtype=low)
    sums = torch.empty(parts, channels, dtype=torch.float32, device=src.device) if sums_up else None
    if rows > 0:
        with on_device(src):
            added_kernel[(parts * across,)](
                src, x, weight, bias, chosen, y, y_low, sums, rows, sequences, channels, x.shape[2], w_sn, w_sk,
                **constants,
            )  # fmt: skip
    return y, y if y_low is None else y_low, sums


def _lowered(grad: Tensor, chosen: Tensor | None, low: torch.dtype) -> tuple[Tensor, Tensor]:
    grad, chosen = contiguous(grad, chosen)
    bm, bn, warps = LOWERED.value
    frames, sequences, channels = grad.shape
    rows = frames * sequences
    parts = cdiv(rows, bm)
    lowered = None if chosen is None and grad.dtype == low else torch.empty_like(grad, dtype=low)
    sums = torch.empty(parts, channels, dtype=torch.float32, device=grad.device)
    if rows > 0:
        with on_device(grad):
            lowered_kernel[(parts * cdiv(channels, bn),)](
                grad, chosen, lowered, sums, rows, sequences, channels, BM=bm, BN=bn, num_warps=warps
            )
    return grad if lowered is None else lowered, sums


def _totals(sums: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    bn, at_once, warps = TOTALS.value
    (parts, channels), total = sums.shape, sums.new_empty(sums.shape[1])
    other_parts, other_channels, other_total = 0, 0, None
    if other is not None:
        (other_parts, other_channels), other_total = other.shape, other.new_empty(other.shape[1])
    with on_device(sums):
        totals_kernel[(cdiv(channels, bn) + cdiv(other_channels, bn),)](
            sums, total, parts, channels, other, other_total, other_parts, other_channels,
            BN=bn, PARTS=at_once, num_warps=warps,
        )  # fmt: skip
    return total, other_total


TRITON = Products(_activated, _activated_gradient, _added, _added_gradient, weight_gradient, _lowered, _totals)
