"""The bypass in Triton: tiles of neighbouring channels and several rows.

Backward runs a fixed number of programs for each group of channels; they stride over the rows, and each leaves its
share of the scales' gradient in a buffer, which a second kernel adds up in order.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import cdiv, multiprocessors, next_power_of_2, on_device
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bypass import triton_scale
from zipformer_kernels.ops.bypass.rows import Gradients, Rows, unsupported

TILE = tuning.entry("bypass.triton_tile")
COLUMNS = tuning.entry("bypass.triton_columns")
WARPS = tuning.entry("bypass.triton_warps")
PROGRAMS_PER_MULTIPROCESSOR = tuning.entry("bypass.triton_programs")
PART_ROWS = tuning.entry("bypass.triton_part_rows")
SUM_COLUMNS = tuning.entry("bypass.triton_sum_columns")
SUM_PARTS = tuning.entry("bypass.triton_sum_parts")


@jit(do_not_specialize=["rows"])
def forward_kernel(a_ptr, b_ptr, c_ptr, y_ptr, rows, C, groups, R: tl.constexpr, COLUMNS: tl.constexpr):
    """R rows and COLUMNS channels per program."""
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64) * R + tl.arange(0, R)
    c = group * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    i = row[:, None] * C + c[None, :]
    a = tl.load(a_ptr + i, inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + i, inside, other=0.0).to(tl.float32)
    scale = tl.load(c_ptr + c, c < C, other=0.0)
    tl.store(y_ptr + i, (a + (b - a) * scale[None, :]).to(y_ptr.dtype.element_ty), inside)


@jit(do_not_specialize=["rows", "parts"])
def backward_kernel(
    g_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    da_ptr,
    db_ptr,
    partials_ptr,
    rows,
    C,
    groups,
    parts,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """R rows at a time and COLUMNS channels per program, of which `parts` share the rows."""
    group = tl.program_id(0) % groups
    part = (tl.program_id(0) // groups).to(tl.int64)
    c = group * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(c_ptr + c, c < C, other=0.0)
    sums = tl.zeros([R, COLUMNS], tl.float32)
    for first in range(part * R, rows, parts.to(tl.int64) * R):
        row = first + tl.arange(0, R)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        i = row[:, None] * C + c[None, :]
        g = tl.load(g_ptr + i, inside, other=0.0).to(tl.float32)
        if NEEDS_SUMS:
            a = tl.load(a_ptr + i, inside, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + i, inside, other=0.0).to(tl.float32)
            sums += g * (b - a)
        through = g * scale[None, :]
        if NEEDS_A:
            tl.store(da_ptr + i, (g - through).to(da_ptr.dtype.element_ty), inside)
        if NEEDS_B:
            tl.store(db_ptr + i, through.to(db_ptr.dtype.element_ty), inside)
    if NEEDS_SUMS:
        tl.store(partials_ptr + part * C + c, tl.sum(sums, 0), c < C)


@jit(do_not_specialize=["parts"])
def sum_parts(partials_ptr, dc_ptr, parts, C, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of COLUMNS columns per program."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (c < C)[None, :]
        sums += tl.load(partials_ptr + part.to(tl.int64)[:, None] * C + c[None, :], inside, other=0.0)
    tl.store(dc_ptr + c, tl.sum(sums, 0), c < C)


def _tile(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    columns = min(COLUMNS.value, next_power_of_2(channels))
    return TILE.value // columns, columns


def _forward(src_orig: Tensor, src: Tensor, scale: Tensor) -> tuple[Tensor]:
    rows = Rows(src_orig, src, scale)
    y = rows.result()
    if y.numel() > 0:
        count, channels = rows.shape
        tile = _tile(channels)
        groups = cdiv(channels, tile[1])
        grid = (cdiv(count, tile[0]) * groups,)
        with on_device(y):
            tensors = rows.a, rows.b, rows.c, y
            forward_kernel[grid](*tensors, count, channels, groups, *tile, num_warps=WARPS.value)
    return (rows.returned(y),)


def _backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], src_orig: Tensor, src: Tensor, scale: Tensor
) -> tuple[Tensor | None, ...]:
    rows = Rows(src_orig, src, scale)
    count, channels = rows.shape
    tile = _tile(channels)
    groups = cdiv(channels, tile[1])
    most = PROGRAMS_PER_MULTIPROCESSOR.value * multiprocessors(rows.a) // max(groups, 1)
    out = Gradients(rows, needs, max(1, min(most, count // PART_ROWS.value)))
    if rows.a.numel() > 0:
        tensors = grads[0].contiguous(), rows.a, rows.b, rows.c, out.da, out.db, out.partials
        sizes = count, channels, groups, out.parts
        with on_device(rows.a):
            backward_kernel[(groups * out.parts,)](*tensors, *sizes, *needs, *tile, num_warps=WARPS.value)
            if out.dc is not None:
                tile = SUM_PARTS.value, SUM_COLUMNS.value
                sums = out.partials, out.dc, out.parts, channels
                sum_parts[(cdiv(channels, tile[1]),)](*sums, *tile, num_warps=WARPS.value)
    return out.returned()


launchers = Launchers(
    unsupported,
    _forward,
    _backward,
    variants={"scale": triton_scale.scale_launchers, "limit": triton_scale.limit_launchers},
)
