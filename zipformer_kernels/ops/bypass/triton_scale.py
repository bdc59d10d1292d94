"""In Triton, one small kernel each: the scales with which sequences skip, their gradient, and limits on parameters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import as_empty_like, cdiv, contiguous, on_device
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bypass.reference import limit_backward
from zipformer_kernels.ops.bypass.rows import unsupported

BLOCK = tuning.entry("bypass.triton_block")
SUM_COLUMNS = tuning.entry("bypass.triton_sum_columns")
SEQUENCES = tuning.entry("bypass.triton_sequences")
WARPS = tuning.entry("bypass.triton_warps")


@triton.jit
def kept(draws_ptr, b, B, rate, DRAWN: tl.constexpr):
    """1 for each sequence that is kept, 0 for one that skips."""
    return tl.where(tl.load(draws_ptr + b, b < B, other=0.0) > rate, 1.0, 0.0) if DRAWN else b * 0.0 + 1.0


@triton.jit
def passed(draws_ptr, b, B, rate, DRAWN: tl.constexpr):
    """The least scale of each sequence: 1 where it goes straight through."""
    return tl.where(tl.load(draws_ptr + b, b < B, other=1.0) < rate, 1.0, 0.0) if DRAWN else b * 0.0


@jit(do_not_specialize=["B"])
def scale_kernel(
    scale_ptr,
    skips_ptr,
    straight_ptr,
    y_ptr,
    skip_rate,
    straight_rate,
    B,
    C,
    SKIPS: tl.constexpr,
    STRAIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK scales of one sequence per program."""
    b = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + c, c < C, other=0.0).to(tl.float32)
    y = scale * kept(skips_ptr, b, B, skip_rate, SKIPS)
    if STRAIGHT:
        least = passed(straight_ptr, b, B, straight_rate, STRAIGHT)
        y = tl.where(y == y, tl.maximum(y, least), y)
    tl.store(y_ptr + b.to(tl.int64) * C + c, y.to(y_ptr.dtype.element_ty), c < C)


@jit(do_not_specialize=["B"])
def scale_gradient_kernel(
    dy_ptr,
    scale_ptr,
    skips_ptr,
    straight_ptr,
    dscale_ptr,
    skip_rate,
    straight_rate,
    B,
    C,
    SKIPS: tl.constexpr,
    STRAIGHT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums over sequences of COLUMNS scales per program; of equals the maximum's gradient goes by halves."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(scale_ptr + c, c < C, other=0.0).to(tl.float32)
    sums = tl.zeros([SEQUENCES, COLUMNS], tl.float32)
    for first in range(0, B, SEQUENCES):
        b = first + tl.arange(0, SEQUENCES)
        inside = (b < B)[:, None] & (c < C)[None, :]
        dy = tl.load(dy_ptr + b.to(tl.int64)[:, None] * C + c[None, :], inside, other=0.0).to(tl.float32)
        keep = kept(skips_ptr, b, B, skip_rate, SKIPS)[:, None]
        if STRAIGHT:
            least = passed(straight_ptr, b, B, straight_rate, STRAIGHT)[:, None]
            y = scale[None, :] * keep
            dy *= tl.where(y > least, 1.0, tl.where(y == least, 0.5, 0.0))
        sums += dy * keep
    tl.store(dscale_ptr + c, tl.sum(sums, 0).to(dscale_ptr.dtype.element_ty), c < C)


@jit
def limit_kernel(grad_ptr, x_ptr, y_ptr, least, most, count, BLOCK: tl.constexpr):
    """BLOCK gradients per program, turned where they would push x further out of its limits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + i, i < count, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + i, i < count, other=0.0).to(tl.float32)
    outwards = ((grad > 0) & (x < least)) | ((grad < 0) & (x > most))
    tl.store(y_ptr + i, tl.where(outwards, -grad, grad).to(y_ptr.dtype.element_ty), i < count)


def _scale(
    scale: Tensor, skips: Tensor | None, straight: Tensor | None, skip_rate: float, straight_rate: float, batch: int
) -> tuple[Tensor]:
    channels, block = scale.numel(), BLOCK.value
    y = scale.new_empty(batch, channels)
    tensors, drawn = contiguous(scale, skips, straight), (skips is not None, straight is not None)
    if y.numel() > 0:
        with on_device(scale):
            scale_kernel[batch, cdiv(channels, block)](
                *tensors, y, skip_rate, straight_rate, batch, channels, *drawn, block, num_warps=WARPS.value
            )
    return (y,)


def _scale_gradient(
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[()],
    scale: Tensor,
    skips: Tensor | None,
    straight: Tensor | None,
    skip_rate: float,
    straight_rate: float,
    batch: int,
) -> tuple[Tensor | None, None, None]:
    channels, tile = scale.numel(), (SEQUENCES.value, SUM_COLUMNS.value)
    dscale = torch.empty_like(scale, memory_format=torch.contiguous_format)
    tensors, drawn = contiguous(grads[0], scale, skips, straight), (skips is not None, straight is not None)
    if channels > 0:
        with on_device(scale):
            scale_gradient_kernel[(cdiv(channels, tile[1]),)](
                *tensors, dscale, skip_rate, straight_rate, batch, channels, *drawn, *tile, num_warps=WARPS.value
            )
    return as_empty_like(dscale, scale), None, None


def _limit(grad: Tensor, x: Tensor, least: float, most: float) -> tuple[Tensor]:
    y = torch.empty_like(grad, memory_format=torch.contiguous_format)
    count, block = grad.numel(), BLOCK.value
    if count > 0:
        with on_device(grad):
            tensors = *contiguous(grad, x), y
            limit_kernel[(cdiv(count, block),)](*tensors, least, most, count, block, num_warps=WARPS.value)
    return (as_empty_like(y, grad),)


def _unsupported(*args: Tensor | float | None) -> str | None:
    return unsupported(*(x for x in args if isinstance(x, Tensor)))


scale_launchers = Launchers(_unsupported, _scale, _scale_gradient)
limit_launchers = Launchers(_unsupported, _limit, limit_backward)
