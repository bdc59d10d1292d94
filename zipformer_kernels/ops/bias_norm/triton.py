"""BiasNorm in Triton. Rows of up to 2048 channels are read once, several to a program; longer ones in blocks.

Backward runs a fixed number of programs that stride over the rows; each leaves its share of the gradients of
bias and log_scale in a buffer, which a second kernel adds up in order.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import GPU_DTYPES, cdiv, multiprocessors, next_power_of_2, on_device
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bias_norm import triton_bypass
from zipformer_kernels.ops.bias_norm.rows import Gradients, Rows, unsupported
from zipformer_kernels.ops.bias_norm.triton_rows import inverse_rms, rescaling

TILE = tuning.entry("bias_norm.triton_tile")
MOST_ROWS = tuning.entry("bias_norm.triton_rows")
WARPS = tuning.entry("bias_norm.triton_warps")
PROGRAMS_PER_MULTIPROCESSOR = tuning.entry("bias_norm.triton_programs")
SUM_COLUMNS = tuning.entry("bias_norm.triton_sum_columns")
SUM_PARTS = tuning.entry("bias_norm.triton_sum_parts")


@jit
def forward_tiles(x_ptr, bias_ptr, log_scale_ptr, y_ptr, inverse_ptr, rows, C, R: tl.constexpr, BLOCK: tl.constexpr):
    """R whole rows per program, of BLOCK >= C channels each."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    i = row[:, None] * C + c[None, :]
    x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c < C, other=0.0)
    r = inverse_rms(tl.where(inside, x - bias[None, :], 0.0), C)
    s = tl.exp(tl.load(log_scale_ptr)) * r
    tl.store(y_ptr + i, (x * s[:, None]).to(y_ptr.dtype.element_ty), inside)
    tl.store(inverse_ptr + row, r, row < rows)


@triton.jit
def sum_of_squares(x_ptr, bias_ptr, start, scale, C, BLOCK: tl.constexpr):
    """sum_c (scale (x_c - bias_c))^2 over one row that begins at `start`."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start + c, c < C, other=0.0).to(tl.float32)
        d = (x - tl.load(bias_ptr + c, c < C, other=0.0)) * scale
        total += d * d
    return tl.sum(total, 0)


@jit
def forward_row(x_ptr, bias_ptr, log_scale_ptr, y_ptr, inverse_ptr, C, BLOCK: tl.constexpr):
    """One row per program, BLOCK channels at a time."""
    row = tl.program_id(0).to(tl.int64)
    start = row * C
    mean = sum_of_squares(x_ptr, bias_ptr, start, 1.0, C, BLOCK) / C
    scale = rescaling(mean)
    if scale != 1.0:
        mean = sum_of_squares(x_ptr, bias_ptr, start, scale, C, BLOCK) / C
    r = scale * tl.rsqrt(mean)
    s = tl.exp(tl.load(log_scale_ptr)) * r
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start + c, c < C, other=0.0).to(tl.float32)
        tl.store(y_ptr + start + c, (x * s).to(y_ptr.dtype.element_ty), c < C)
    tl.store(inverse_ptr + row, r)


@jit
def backward_tiles(
    dy_ptr,
    x_ptr,
    bias_ptr,
    log_scale_ptr,
    inverse_ptr,
    dx_ptr,
    partials_ptr,
    rows,
    C,
    NEEDS_X: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """R whole rows at a time, of BLOCK >= C channels each; a share of the sums per program."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    gain = tl.exp(tl.load(log_scale_ptr))
    bias = tl.load(bias_ptr + c, c < C, other=0.0)
    dbias = tl.zeros([R, BLOCK], tl.float32)
    total = tl.zeros([R], tl.float32)
    for first in range(program * R, rows, programs.to(tl.int64) * R):
        row = first + tl.arange(0, R)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        i = row[:, None] * C + c[None, :]
        x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + i, inside, other=0.0).to(tl.float32)
        r = tl.load(inverse_ptr + row, row < rows, other=0.0)
        q = tl.sum(dy * (x * r[:, None]), 1)
        s = gain * r
        t = tl.where(inside, (x - bias[None, :]) * r[:, None] * (s * q / C)[:, None], 0.0)
        if NEEDS_X:
            tl.store(dx_ptr + i, (s[:, None] * dy - t).to(dx_ptr.dtype.element_ty), inside)
        if NEEDS_SUMS:
            dbias += t
            total += q
    if NEEDS_SUMS:
        share = partials_ptr + program * (C + 1)
        tl.store(share + c, tl.sum(dbias, 0), c < C)
        tl.store(share + C, gain * tl.sum(total, 0))


@jit
def backward_row(
    dy_ptr,
    x_ptr,
    bias_ptr,
    log_scale_ptr,
    inverse_ptr,
    dx_ptr,
    partials_ptr,
    rows,
    C,
    NEEDS_X: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row at a time, BLOCK channels at a time; the program's share of the sums grows in memory."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    share = partials_ptr + program * (C + 1) if NEEDS_SUMS else partials_ptr
    gain = tl.exp(tl.load(log_scale_ptr))
    total = 0.0
    for row in range(program, rows, programs.to(tl.int64)):
        r = tl.load(inverse_ptr + row)
        products = tl.zeros([BLOCK], tl.float32)
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * C + c, c < C, other=0.0).to(tl.float32)
            products += tl.load(dy_ptr + row * C + c, c < C, other=0.0).to(tl.float32) * (x * r)
        q = tl.sum(products, 0)
        s = gain * r
        total += q
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * C + c, c < C, other=0.0).to(tl.float32)
            t = (x - tl.load(bias_ptr + c, c < C, other=0.0)) * r * (s * q / C)
            if NEEDS_X:
                dy = tl.load(dy_ptr + row * C + c, c < C, other=0.0).to(tl.float32)
                tl.store(dx_ptr + row * C + c, (s * dy - t).to(dx_ptr.dtype.element_ty), c < C)
            if NEEDS_SUMS:
                earlier = tl.load(share + c, (c < C) & (row > program), other=0.0)
                tl.store(share + c, earlier + t, c < C)
    if NEEDS_SUMS:
        tl.store(share + C, gain * total)


@jit
def sum_parts(
    partials_ptr,
    dbias_ptr,
    dlog_scale_ptr,
    parts,
    C,
    NEEDS_BIAS: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of COLUMNS columns per program: dbias, and dlog_scale in column C."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (c <= C)[None, :]
        sums += tl.load(partials_ptr + part.to(tl.int64)[:, None] * (C + 1) + c[None, :], inside, other=0.0)
    total = tl.sum(sums, 0)
    if NEEDS_BIAS:
        tl.store(dbias_ptr + c, total, c < C)
    if NEEDS_SCALE:
        tl.store(dlog_scale_ptr + tl.zeros_like(c), total, c == C)


def _tile(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile that holds whole rows, or no rows where a row is too long for that."""
    tile, block = TILE.value, next_power_of_2(channels)
    return (min(tile // block, MOST_ROWS.value), block) if block <= tile else (0, tile)


def _forward(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = Rows(x, bias, log_scale)
    y, inverse_rms = rows.results()
    if x.numel() > 0:
        count, channels = rows.shape
        height, block = _tile(channels)
        tensors = rows.x, rows.bias, rows.log_scale, y, inverse_rms
        with on_device(x):
            if height > 0:
                grid = (cdiv(count, height),)
                forward_tiles[grid](*tensors, count, channels, height, block, num_warps=WARPS.value)
            else:
                forward_row[(count,)](*tensors, channels, block, num_warps=WARPS.value)
    return rows.returned(y), inverse_rms


def _backward(needs: tuple, grads: tuple, saved: tuple, x: Tensor, bias: Tensor, log_scale: Tensor):
    rows = Rows(x, bias, log_scale)
    count, channels = rows.shape
    height, block = _tile(channels)
    parts = rows.groups(shortest=max(height, 1), most=PROGRAMS_PER_MULTIPROCESSOR.value * multiprocessors(x))
    out = Gradients(rows, needs, parts)
    if x.numel() > 0:
        dy, (inverse_rms,) = grads[0].contiguous(), saved
        tensors = dy, rows.x, rows.bias, rows.log_scale, inverse_rms, out.dx, out.partials
        wanted = needs[0], out.partials is not None
        with on_device(x):
            if height > 0:
                backward_tiles[(parts,)](*tensors, count, channels, *wanted, height, block, num_warps=WARPS.value)
            else:
                backward_row[(parts,)](*tensors, count, channels, *wanted, block, num_warps=WARPS.value)
            if out.partials is not None:
                tile = SUM_PARTS.value, SUM_COLUMNS.value
                grid = (cdiv(channels + 1, tile[1]),)
                sums = out.partials, out.dbias, out.dlog_scale
                sum_parts[grid](*sums, parts, channels, *needs[1:], *tile, num_warps=WARPS.value)
    return out.returned()


launchers = Launchers(
    partial(unsupported, GPU_DTYPES), _forward, _backward, variants={"bypass": triton_bypass.launchers}
)
