"""The Balancer's gradient in Triton: a pass for the moments of groups of rows, and one that merges them and changes.

Each element of a tile keeps the mean and the sum of squares of the rows that it has met (Welford, 1962). They are
merged by the formula of Chan, Golub and LeVeque for several parts at once, which does not cancel. Every program of the
second pass merges the parts for its channels, in the same order.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling

from zipformer_kernels.core import tuning
from zipformer_kernels.core.autograd import backward_of
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import (
    GPU_DTYPES,
    cdiv,
    contiguous,
    like,
    multiprocessors,
    on_device,
    unsupported_dtype,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.balancer.reference import LEAST, TINY, balanced_gradient
from zipformer_kernels.ops.balancer.rows import in_rows, row_stride, spacing, undefined_moments, unsupported

ROWS = tuning.entry("balancer.triton_rows")
CHANNELS = tuning.entry("balancer.triton_channels")
PARTS = tuning.entry("balancer.triton_parts")
PROGRAMS = tuning.entry("balancer.triton_programs")
WARPS = tuning.entry("balancer.triton_warps")


@jit
def moments_kernel(x_ptr, partials_ptr, x_row, rows, C, part_rows, R: tl.constexpr, BLOCK: tl.constexpr):
    """Mean, and sum of squared differences from it, of BLOCK channels of `part_rows` rows: (parts, 2, C)."""
    part, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = part * part_rows
    end = tl.minimum(first + part_rows, rows)
    mean = tl.zeros([R, BLOCK], tl.float32)
    squares = tl.zeros([R, BLOCK], tl.float32)
    met = 0.0
    for start in range(first, end, R):
        row = start + tl.arange(0, R)
        inside = (row < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + c[None, :], inside, other=0.0).to(tl.float32)
        met += 1.0
        difference = tl.where(inside, x - mean, 0.0)
        mean += difference * (1.0 / met)
        squares += difference * (x - mean)
    count = ((end - first - tl.arange(0, R) + R - 1) // R).to(tl.float32)
    total = tl.sum(count[:, None] * mean, 0) / (end - first).to(tl.float32)
    apart = mean - total[None, :]
    to = partials_ptr + part * 2 * C + c
    tl.store(to, total, c < C)
    tl.store(to + C, tl.sum(squares + count[:, None] * apart * apart, 0), c < C)


@triton.jit
def merged(partials_ptr, c, rows, C, part_rows, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Variance and mean of all rows, from what `moments_kernel` wrote."""
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)
        inside = (part < parts)[:, None] & (c < C)[None, :]
        share = tl.minimum(rows - part * part_rows, part_rows).to(tl.float32) / rows
        total += tl.load(partials_ptr + part[:, None] * (2 * C) + c[None, :], inside, other=0.0) * share[:, None]
    mean = tl.sum(total, 0)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)
        inside = (part < parts)[:, None] & (c < C)[None, :]
        count = tl.minimum(rows - part * part_rows, part_rows).to(tl.float32)
        at = partials_ptr + part[:, None] * (2 * C) + c[None, :]
        apart = tl.load(at, inside, other=0.0) - mean[None, :]
        total += tl.where(inside, tl.load(at + C, inside, other=0.0) + count[:, None] * apart * apart, 0.0)
    return tl.sum(total, 0) / rows, mean


@jit
def merge_kernel(
    partials_ptr, variance_ptr, mean_ptr, rows, C, part_rows, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes variance and mean of BLOCK channels."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    variance, mean = merged(partials_ptr, c, rows, C, part_rows, parts, PARTS, BLOCK)
    tl.store(variance_ptr + c, variance, c < C)
    tl.store(mean_ptr + c, mean, c < C)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)


@jit
def change_kernel(
    grad_ptr,
    x_ptr,
    variance_ptr,
    mean_ptr,
    partials_ptr,
    out_ptr,
    grad_row,
    x_row,
    rows,
    C,
    part_rows,
    parts,
    min_mean,
    max_mean,
    min_rms,
    max_rms,
    grad_scale,
    KNOWN: tl.constexpr,
    TINY: tl.constexpr,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad + |grad| (a + b (x - mean)) for BLOCK channels of `part_rows` rows; a and b by the package's docstring."""
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if KNOWN:
        variance = tl.load(variance_ptr + c, c < C, other=1.0)
        mean = tl.load(mean_ptr + c, c < C, other=0.0)
    else:
        variance, mean = merged(partials_ptr, c, rows, C, part_rows, parts, PARTS, BLOCK)
    square = variance + mean * mean
    stddev, rms = tl.sqrt(tl.maximum(variance, TINY)), tl.sqrt(tl.maximum(square, TINY))
    ratio = mean / stddev
    mean_push = sign(ratio - tl.minimum(tl.maximum(ratio, min_mean), max_mean))
    rms_push = sign(tl.minimum(tl.maximum(rms, min_rms), max_rms) - rms)
    rms_push = tl.where(square >= TINY, rms_push * (stddev / rms) * (stddev / rms), 0.0)
    level = mean_push - rms_push * ratio
    slope = tl.where(variance >= TINY, -mean_push * ratio, 0.0) - rms_push
    norm_square = level * level + slope * slope * (variance / (stddev * stddev))
    scale = grad_scale / tl.sqrt(tl.maximum(norm_square, LEAST))
    level, slope = level * scale, slope * scale / stddev

    first = tl.program_id(0).to(tl.int64) * part_rows
    end = tl.minimum(first + part_rows, rows)
    for start in range(first, end, R):
        row = start + tl.arange(0, R)
        inside = (row < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + c[None, :], inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_row + c[None, :], inside, other=0.0).to(tl.float32)
        out = grad + tl.abs(grad) * (level[None, :] + slope[None, :] * (x - mean[None, :]))
        tl.store(out_ptr + row[:, None] * C + c[None, :], out.to(out_ptr.dtype.element_ty), inside)


class _Grid(NamedTuple):
    """How rows and channels are shared out: programs by groups of rows, and by blocks of channels."""

    rows: int
    channels: int
    part_rows: int

    @property
    def parts(self) -> int:
        return cdiv(self.rows, self.part_rows)

    @property
    def blocks(self) -> tuple[int, int]:
        return self.parts, cdiv(self.channels, CHANNELS.value)

    @staticmethod
    def of(x: Tensor, channels: int) -> _Grid:
        rows = x.numel() // channels
        wanted = cdiv(PROGRAMS.value * multiprocessors(x), cdiv(channels, CHANNELS.value))
        return _Grid(rows, channels, cdiv(cdiv(rows, wanted), ROWS.value) * ROWS.value)


def _strided(x: Tensor, channel_dim: int) -> tuple[Tensor, int]:
    """x, copied where the kernels cannot read it, and how far its rows are apart."""
    stride = row_stride(x, channel_dim)
    return (in_rows(x, channel_dim), x.shape[channel_dim]) if stride is None else (x, stride)


def _alike(grad: Tensor, out: Tensor, channel_dim: int) -> tuple[Tensor, int]:
    """grad with its rows in the order of `out`, copied where they are not, and how far they are apart."""
    stride = spacing(grad, channel_dim) if out.is_contiguous() else None
    return (like(grad, out), out.shape[channel_dim]) if stride is None else (grad, stride)


def _partials(x: Tensor, x_row: int, grid: _Grid) -> Tensor:
    """Mean and sum of squares of each part, (parts, 2, channels); rows of x are `x_row` apart."""
    partials = x.new_empty((grid.parts, 2, grid.channels), dtype=torch.float32)
    moments_kernel[grid.blocks](x, partials, x_row, *grid, ROWS.value, CHANNELS.value, num_warps=WARPS.value)
    return partials


def _moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Variance, by N, and mean of each channel, (channels,), in float32."""
    channels = x.shape[channel_dim]
    if x.numel() == 0:
        return undefined_moments(x, channels)
    x, x_row = _strided(x, channel_dim)
    grid = _Grid.of(x, channels)
    variance, mean = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    with on_device(x):
        tensors = _partials(x, x_row, grid), variance, mean
        sizes = *grid, grid.parts, PARTS.value, CHANNELS.value
        merge_kernel[(cdiv(channels, CHANNELS.value),)](*tensors, *sizes, num_warps=WARPS.value)
    return variance, mean


def _forward(
    grad: Tensor, x: Tensor, variance: Tensor | None, mean: Tensor | None, channel_dim: int, *limits: float
) -> tuple[Tensor]:
    if x.numel() == 0:
        return (torch.empty_like(x),)
    rows, x_row = _strided(x, channel_dim)
    out = torch.empty_like(rows)
    grad, grad_row = _alike(grad, out, channel_dim)
    known = variance is not None and mean is not None
    variance, mean = contiguous(variance, mean) if known else (None, None)
    grid = _Grid.of(x, x.shape[channel_dim])
    with on_device(x):
        partials = None if known else _partials(rows, x_row, grid)
        tensors = grad, rows, variance, mean, partials, out
        constants = known, TINY, LEAST, PARTS.value, ROWS.value, CHANNELS.value
        change_kernel[grid.blocks](
            *tensors, grad_row, x_row, *grid, grid.parts, *limits, *constants, num_warps=WARPS.value
        )
    return (like(out, torch.empty_like(x)),)


def _worthwhile(x: Tensor, channel_dim: int) -> bool:
    """Whether x is read as it is; torch.compile cannot record the question, and fuses the formula itself."""
    return not is_compiling() and row_stride(x, channel_dim) is not None


launchers = Launchers(
    partial(unsupported, GPU_DTYPES),
    _forward,
    backward_of(balanced_gradient),
    lambda grad, x, variance, mean, channel_dim, *_: _worthwhile(x, channel_dim),
    variants={
        "moments": Launchers(lambda x, _: unsupported_dtype(x, GPU_DTYPES), _moments, None, _worthwhile),
    },
)
