"""The bypass around a slower stack in Triton: one pass forward, one backward, and a sum of the scale's gradient.

A program has a sequence, some frames of src and a block of channels. It reads each of them once, and mixes it with the
frames at the full rate that it becomes, place after place.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import GPU_DTYPES, as_empty_like, cdiv, contiguous, on_device, unsupported_dtype
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.upsample_bypass.reference import empty_results

FRAMES = tuning.entry("upsample_bypass.triton_frames")
CHANNELS = tuning.entry("upsample_bypass.triton_channels")
PARTS = tuning.entry("upsample_bypass.triton_parts")
COLUMNS = tuning.entry("upsample_bypass.triton_columns")
WARPS = tuning.entry("upsample_bypass.triton_warps")


@jit
def forward_kernel(
    orig_ptr,
    src_ptr,
    scale_ptr,
    mask_ptr,
    y_ptr,
    frames,
    length,
    batch,
    own,
    C,
    orig_frame,
    orig_sequence,
    scale_sequence,
    MASKED: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What R frames of src become."""
    b = (tl.program_id(0) % batch).to(tl.int64)
    i = (tl.program_id(0) // batch).to(tl.int64) * R + tl.arange(0, R)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < length)[:, None] & (c < C)[None, :]
    src = tl.load(src_ptr + (i * batch + b)[:, None] * C + c[None, :], inside, other=0.0).to(tl.float32)
    if MASKED:
        src *= tl.load(mask_ptr + b * C + c, c < C, other=0).to(tl.float32)[None, :]
    scale = tl.load(scale_ptr + b * scale_sequence + c, c < C, other=0.0).to(tl.float32)[None, :]
    for p in tl.static_range(F):
        t = i * F + p
        there = inside & (t < frames)[:, None]
        at = orig_ptr + t[:, None] * orig_frame + b * orig_sequence + c[None, :]
        orig = tl.load(at, there & (c < own)[None, :], other=0.0).to(tl.float32)
        y = orig + (src - orig) * scale
        tl.store(y_ptr + (t * batch + b)[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), there)


@jit
def backward_kernel(
    dy_ptr,
    orig_ptr,
    src_ptr,
    scale_ptr,
    mask_ptr,
    dorig_ptr,
    dsrc_ptr,
    partials_ptr,
    frames,
    length,
    batch,
    own,
    C,
    orig_frame,
    orig_sequence,
    scale_sequence,
    dy_frame,
    dy_sequence,
    NEEDS_ORIG: tl.constexpr,
    NEEDS_SRC: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of R frames of src and of those that they become, and a share of the scale's."""
    b = (tl.program_id(0) % batch).to(tl.int64)
    block = (tl.program_id(0) // batch).to(tl.int64)
    i = block * R + tl.arange(0, R)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < length)[:, None] & (c < C)[None, :]
    scale = tl.load(scale_ptr + b * scale_sequence + c, c < C, other=0.0).to(tl.float32)[None, :]
    place = (i * batch + b)[:, None] * C + c[None, :]
    dsrc = tl.zeros([R, BLOCK], tl.float32)
    dscale = tl.zeros([R, BLOCK], tl.float32)
    for p in tl.static_range(F):
        t = i * F + p
        there = inside & (t < frames)[:, None]
        dy = tl.load(dy_ptr + t[:, None] * dy_frame + b * dy_sequence + c[None, :], there, other=0.0).to(tl.float32)
        dsrc += dy
        within = there & (c < own)[None, :]
        if NEEDS_SCALE:
            at = orig_ptr + t[:, None] * orig_frame + b * orig_sequence + c[None, :]
            dscale -= dy * tl.load(at, within, other=0.0).to(tl.float32)
        if NEEDS_ORIG:
            to = dorig_ptr + (t * batch + b)[:, None] * own + c[None, :]
            tl.store(to, (dy - dy * scale).to(dorig_ptr.dtype.element_ty), within)
    if MASKED:
        dsrc *= tl.load(mask_ptr + b * C + c, c < C, other=0).to(tl.float32)[None, :]
    if NEEDS_SCALE:
        dscale += dsrc * tl.load(src_ptr + place, inside, other=0.0).to(tl.float32)
        tl.store(partials_ptr + (block * batch + b) * C + c, tl.sum(dscale, 0), c < C)
    if NEEDS_SRC:
        tl.store(dsrc_ptr + place, (dsrc * scale).to(dsrc_ptr.dtype.element_ty), inside)


@jit
def sum_parts(partials_ptr, sums_ptr, parts, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of COLUMNS columns."""
    c = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)
        inside = (part < parts)[:, None] & (c < columns)[None, :]
        total += tl.load(partials_ptr + part[:, None] * columns + c[None, :], inside, other=0.0)
    tl.store(sums_ptr + c, tl.sum(total, 0).to(sums_ptr.dtype.element_ty), c < columns)


def _readable(x: Tensor) -> Tensor:
    """x, copied if its channels do not lie side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


class _Call:
    """A call's tensors as kernels read them, and its sizes."""

    def __init__(self, src_orig: Tensor, src: Tensor, scale: Tensor, mask: Tensor | None, factor: int) -> None:
        orig = _readable(src_orig)
        src, scale, mask = contiguous(src, scale, mask)
        (frames, batch, own), (length, _, channels) = orig.shape, src.shape
        self.tensors = orig, src, scale, mask
        by_sequence = channels if scale.ndim == 2 else 0
        self.sizes = frames, length, batch, own, channels, *orig.stride()[:2], by_sequence
        self.constants = mask is not None, factor, FRAMES.value, CHANNELS.value
        self.blocks = cdiv(length, FRAMES.value)
        self.grid = batch * self.blocks, cdiv(channels, CHANNELS.value)


def _forward(src_orig: Tensor, src: Tensor, scale: Tensor, mask: Tensor | None, factor: int) -> tuple[Tensor]:
    (y,) = empty_results(src_orig, src, scale, mask, factor)
    if y.numel() > 0:
        call = _Call(src_orig, src, scale, mask, factor)
        with on_device(src):
            forward_kernel[call.grid](*call.tensors, y, *call.sizes, *call.constants, num_warps=WARPS.value)
    return (y,)


def _backward(
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[()],
    src_orig: Tensor,
    src: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    factor: int,
) -> tuple[Tensor | None, ...]:
    dy, wanted, given = _readable(grads[0]), needs[:3], (src_orig, src, scale)
    make = torch.zeros if dy.numel() == 0 else torch.empty
    found = [make(x.shape, dtype=x.dtype, device=x.device) if n else None for x, n in zip(given, wanted, strict=True)]
    if dy.numel() > 0 and any(wanted):
        call = _Call(src_orig, src, scale, mask, factor)
        parts = dy.new_empty((call.blocks, *src.shape[1:]), dtype=torch.float32) if needs[2] else None
        with on_device(src):
            tensors = dy, *call.tensors, *found[:2], parts
            sizes = *call.sizes, *dy.stride()[:2]
            backward_kernel[call.grid](*tensors, *sizes, *wanted, *call.constants, num_warps=WARPS.value)
            if parts is not None:
                columns = scale.numel()
                grid = (cdiv(columns, COLUMNS.value),)
                rows = parts.numel() // columns
                tile = PARTS.value, COLUMNS.value
                sum_parts[grid](parts, found[2], rows, columns, *tile, num_warps=WARPS.value)
    return *(None if g is None else as_empty_like(g, x) for g, x in zip(found, given, strict=True)), None


def _unsupported(*args: object) -> str | None:
    return next(filter(None, (unsupported_dtype(x, GPU_DTYPES) for x in args[:3])), None)


launchers = Launchers(_unsupported, _forward, _backward)
