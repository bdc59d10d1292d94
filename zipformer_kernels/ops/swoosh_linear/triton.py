"""The elementwise half of swoosh_linear in Triton: one pass forward, one backward.

A program serves a tile of rows that share their mask, and so reads the mask once for all of them.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import GPU_DTYPES, as_empty_like, cdiv, next_power_of_2, on_device
from zipformer_kernels.ops.swoosh.reference import OFFSET, SHIFT
from zipformer_kernels.ops.swoosh.triton import swoosh_derivative, swoosh_value
from zipformer_kernels.ops.swoosh_linear.layout import layout
from zipformer_kernels.ops.swoosh_linear.product import around_product, unsupported

FORWARD_TILE = tuning.entry("swoosh_linear.triton_forward")
BACKWARD_TILE = tuning.entry("swoosh_linear.triton_backward")
MOST_COLUMNS = tuning.entry("swoosh_linear.triton_columns")
WARPS = tuning.entry("swoosh_linear.triton_warps")


@triton.jit
def place(mask_ptr, shared, inner, across, down, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's tile: its elements, which of them exist, and their mask, of one row."""
    block = tl.program_id(0) // across
    c = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = (block % down).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outer = (block // down).to(tl.int64)
    i = (outer * shared + row)[:, None] * inner + c[None, :]
    inside = (row < shared)[:, None] & (c < inner)[None, :]
    if MASKED:
        mask = tl.load(mask_ptr + outer * inner + c, c < inner, other=0.0)
    else:
        mask = tl.full([COLUMNS], 1.0, tl.float32)
    return i, inside, mask[None, :]


@jit
def forward_kernel(
    x_ptr,
    mask_ptr,
    a_ptr,
    shared,
    inner,
    across,
    down,
    MASKED: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i, inside, mask = place(mask_ptr, shared, inner, across, down, MASKED, ROWS, COLUMNS)
    x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
    a = swoosh_value(x, SHIFT, OFFSET) * mask
    tl.store(a_ptr + i, a.to(a_ptr.dtype.element_ty), inside)


@jit
def backward_kernel(
    da_ptr,
    x_ptr,
    mask_ptr,
    dx_ptr,
    a_ptr,
    shared,
    inner,
    across,
    down,
    MASKED: tl.constexpr,
    WITH_A: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i, inside, mask = place(mask_ptr, shared, inner, across, down, MASKED, ROWS, COLUMNS)
    x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + i, inside, other=0.0).to(tl.float32)
    dx = da * mask * swoosh_derivative(x, SHIFT)
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), inside)
    if WITH_A:
        a = swoosh_value(x, SHIFT, OFFSET) * mask
        tl.store(a_ptr + i, a.to(a_ptr.dtype.element_ty), inside)


class _Tiles:
    """How a pass over x is cut into tiles: the kernels' sizes, and those known when they are compiled."""

    def __init__(self, tile: int, x: Tensor, mask: Tensor | None) -> None:
        self.mask, outer, shared, inner = layout(x, mask)
        if mask is None:  # one long row leaves no columns of a tile idle
            shared, inner = 1, x.numel()
        columns = min(MOST_COLUMNS.value, tile, next_power_of_2(inner))
        rows = min(tile // columns, next_power_of_2(shared))
        across, down = cdiv(inner, columns), cdiv(shared, rows)
        self.grid = (outer * across * down,)
        self.sizes = shared, inner, across, down
        self.constants = {"MASKED": mask is not None, "ROWS": rows, "COLUMNS": columns, "num_warps": WARPS.value}


def _activate(x: Tensor, mask: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    a = torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        tiles = _Tiles(FORWARD_TILE.value, x, mask)
        curve = {"SHIFT": SHIFT[kind], "OFFSET": OFFSET[kind]}
        with on_device(x):
            forward_kernel[tiles.grid](x, tiles.mask, a, *tiles.sizes, **curve, **tiles.constants)
    return a


def _differentiate(da: Tensor, x: Tensor, mask: Tensor | None, kind: str, with_a: bool) -> tuple[Tensor, Tensor | None]:
    given, x = x, x.contiguous()
    dx = torch.empty_like(x)
    a = torch.empty_like(da) if with_a else None
    if x.numel() > 0:
        tiles = _Tiles(BACKWARD_TILE.value, x, mask)
        curve = {"SHIFT": SHIFT[kind], "OFFSET": OFFSET[kind], "WITH_A": with_a}
        with on_device(x):
            backward_kernel[tiles.grid](da, x, tiles.mask, dx, a, *tiles.sizes, **curve, **tiles.constants)
    return as_empty_like(dx, given), a


launchers = around_product(_activate, _differentiate, partial(unsupported, GPU_DTYPES))
