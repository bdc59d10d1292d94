"""Downsampling in Triton: one pass forward, one backward, and a program that adds up the gradient of the bias.

A program has a sequence, some frames of the result, and a block of channels; it reads the frames of a place one after
the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import (
    GPU_DTYPES,
    as_empty_like,
    cdiv,
    next_power_of_2,
    on_device,
    unsupported_dtype,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.downsample.reference import empty_results

FRAMES = tuning.entry("downsample.triton_frames")
CHANNELS = tuning.entry("downsample.triton_channels")
PARTS = tuning.entry("downsample.triton_parts")
WARPS = tuning.entry("downsample.triton_warps")


@triton.jit
def softmax(bias_ptr, F: tl.constexpr, PLACES: tl.constexpr):
    """The weights of all places, and of PLACES - F that there are not, which are 0."""
    place = tl.arange(0, PLACES)
    bias = tl.load(bias_ptr + place, place < F, other=float("-inf")).to(tl.float32)
    e = tl.exp(bias - tl.max(bias, 0))
    return e / tl.sum(e, 0)


@jit
def forward_kernel(
    src_ptr,
    bias_ptr,
    mask_ptr,
    y_ptr,
    frames,
    length,
    batch,
    C,
    channels,
    src_frame,
    src_sequence,
    MASKED: tl.constexpr,
    F: tl.constexpr,
    PLACES: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """R frames of the result."""
    b = (tl.program_id(0) % batch).to(tl.int64)
    i = (tl.program_id(0) // batch).to(tl.int64) * R + tl.arange(0, R)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weights, place = softmax(bias_ptr, F, PLACES), tl.arange(0, PLACES)
    inside = (i < length)[:, None] & (c < C)[None, :]
    y = tl.zeros([R, BLOCK], tl.float32)
    for p in tl.static_range(F):
        t = tl.minimum(i * F + p, frames - 1)
        x = tl.load(src_ptr + t[:, None] * src_frame + b * src_sequence + c[None, :], inside, other=0.0)
        y += tl.sum(tl.where(place == p, weights, 0.0), 0) * x.to(tl.float32)
    if MASKED:
        y *= tl.load(mask_ptr + b * channels + c, c < channels, other=0).to(tl.float32)[None, :]
    within = (i < length)[:, None] & (c < channels)[None, :]
    tl.store(y_ptr + (i * batch + b)[:, None] * channels + c[None, :], y.to(y_ptr.dtype.element_ty), within)


@jit
def backward_kernel(
    dy_ptr,
    src_ptr,
    bias_ptr,
    mask_ptr,
    dsrc_ptr,
    partials_ptr,
    frames,
    length,
    batch,
    C,
    channels,
    src_frame,
    src_sequence,
    dy_frame,
    dy_sequence,
    NEEDS_SRC: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    F: tl.constexpr,
    PLACES: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the frames that R frames of the result were made of, and a share of the weights' gradients."""
    b = (tl.program_id(0) % batch).to(tl.int64)
    i = (tl.program_id(0) // batch).to(tl.int64) * R + tl.arange(0, R)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weights, place = softmax(bias_ptr, F, PLACES), tl.arange(0, PLACES)
    inside = (i < length)[:, None] & (c < C)[None, :]
    dy = tl.load(dy_ptr + i[:, None] * dy_frame + b * dy_sequence + c[None, :], inside, other=0.0).to(tl.float32)
    if MASKED:
        dy *= tl.load(mask_ptr + b * channels + c, c < C, other=0).to(tl.float32)[None, :]
    sums = tl.zeros([PLACES], tl.float32)
    for p in tl.static_range(F):
        t = i * F + p
        if NEEDS_BIAS:
            last = tl.minimum(t, frames - 1)
            x = tl.load(src_ptr + last[:, None] * src_frame + b * src_sequence + c[None, :], inside, other=0.0)
            sums += tl.where(place == p, tl.sum(tl.sum(dy * x.to(tl.float32), 1), 0), 0.0)
        if NEEDS_SRC:
            own, rest = tl.sum(tl.where(place == p, weights, 0.0), 0), tl.sum(tl.where(place >= p, weights, 0.0), 0)
            dsrc = dy * tl.where(t == frames - 1, rest, own)[:, None]
            to = dsrc_ptr + (t * batch + b)[:, None] * C + c[None, :]
            tl.store(to, dsrc.to(dsrc_ptr.dtype.element_ty), inside & (t < frames)[:, None])
    if NEEDS_BIAS:
        part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partials_ptr + part * PLACES + place, sums)


@jit
def bias_kernel(partials_ptr, bias_ptr, dbias_ptr, parts, F: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr):
    """The gradient of the bias from the shares of that of the weights, in one program."""
    place = tl.arange(0, PLACES)
    total = tl.zeros([PARTS, PLACES], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        total += tl.load(partials_ptr + part[:, None] * PLACES + place[None, :], (part < parts)[:, None], other=0.0)
    dweights, weights = tl.sum(total, 0), softmax(bias_ptr, F, PLACES)
    dbias = weights * (dweights - tl.sum(weights * dweights, 0))
    tl.store(dbias_ptr + place, dbias.to(dbias_ptr.dtype.element_ty), place < F)


def _grid(length: int, batch: int, channels: int) -> tuple[int, int]:
    return batch * cdiv(length, FRAMES.value), cdiv(channels, CHANNELS.value)


def _readable(x: Tensor) -> Tensor:
    """x, copied if its channels do not lie side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _forward(src: Tensor, bias: Tensor, mask: Tensor | None, channels: int) -> tuple[Tensor]:
    (y,) = empty_results(src, bias, mask, channels)
    if y.numel() > 0:
        src, bias = _readable(src), bias.contiguous()
        mask = None if mask is None else mask.contiguous()
        frames, batch, own = src.shape
        sizes = frames, len(y), batch, own, channels, *src.stride()[:2]
        factor = bias.shape[0]
        constants = mask is not None, factor, next_power_of_2(factor), FRAMES.value, CHANNELS.value
        with on_device(src):
            grid = _grid(len(y), batch, channels)
            forward_kernel[grid](src, bias, mask, y, *sizes, *constants, num_warps=WARPS.value)
    return (y,)


def _backward(
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[()],
    src: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    channels: int,
) -> tuple[Tensor | None, ...]:
    dy, x, bias = _readable(grads[0]), _readable(src), bias.contiguous()
    mask = None if mask is None else mask.contiguous()
    factor, places = bias.shape[0], next_power_of_2(bias.shape[0])
    dsrc = src.new_empty(src.shape) if needs[0] else None
    dbias = torch.zeros_like(bias) if needs[1] and src.numel() == 0 else torch.empty_like(bias) if needs[1] else None
    if src.numel() > 0 and any(needs[:2]):
        frames, batch, own = src.shape
        grid = _grid(len(dy), batch, own)
        partials = bias.new_empty((grid[0] * grid[1], places), dtype=torch.float32) if needs[1] else None
        sizes = frames, len(dy), batch, own, channels, *x.stride()[:2], *dy.stride()[:2]
        constants = *needs[:2], mask is not None, factor, places, FRAMES.value, CHANNELS.value
        with on_device(src):
            backward_kernel[grid](dy, x, bias, mask, dsrc, partials, *sizes, *constants, num_warps=WARPS.value)
            if needs[1]:
                sums = partials, bias, dbias, len(partials)
                bias_kernel[(1,)](*sums, factor, places, PARTS.value, num_warps=WARPS.value)
    return None if dsrc is None else as_empty_like(dsrc, src), dbias, None


def _unsupported(src: Tensor, bias: Tensor, *_: object) -> str | None:
    return unsupported_dtype(src, GPU_DTYPES) or unsupported_dtype(bias, GPU_DTYPES)


launchers = Launchers(_unsupported, _forward, _backward)
