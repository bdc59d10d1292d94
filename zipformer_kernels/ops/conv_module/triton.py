"""conv_module in Triton.

The gate is computed once, by a pass of its own, into a tensor that the convolution reads shifted by one tap after
another; so are, in backward, e dy where there are chunks. Programs take a tile of frames of one sequence by a block of
channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import GPU_DTYPES, cdiv, multiprocessors, on_device
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.conv_module.arguments import Arguments, Gradients, unsupported

FRAMES = tuning.entry("conv_module.triton_frames")
CHANNELS = tuning.entry("conv_module.triton_channels")
SUM_FRAMES = tuning.entry("conv_module.triton_sum_frames")
SUM_TAPS = tuning.entry("conv_module.triton_sum_taps")
SUM_CHANNELS = tuning.entry("conv_module.triton_sum_channels")
PART_FRAMES = tuning.entry("conv_module.triton_part_frames")
PARTS_PER_MULTIPROCESSOR = tuning.entry("conv_module.triton_parts")
WARPS = tuning.entry("conv_module.triton_warps")


@triton.jit
def place(T, C, across, FRAMES: tl.constexpr, CHANNELS: tl.constexpr):
    """The program's tile: its sequence, frames and channels, and which of the channels exist."""
    tile = tl.program_id(0)
    b = (tile // across).to(tl.int64)
    t = tile % across * FRAMES + tl.arange(0, FRAMES)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return b, t, c, c < C


@triton.jit
def dense(b, t, c, B, C):
    """Where [t, b, c] of a dense tensor lies."""
    return (t.to(tl.int64)[:, None] * B + b) * C + c[None, :]


@triton.jit
def load_frames(x_ptr, b, t, c, present, B, C):
    """x[t, b, c] in float32, zero where not `present`; x dense."""
    return tl.load(x_ptr + dense(b, t, c, B, C), present, other=0.0).to(tl.float32)


@triton.jit
def edge_factor(edge_ptr, p, c, present, C, S, K: tl.constexpr):
    """e_p for positions p in their chunks, (frames, channels)."""
    left = edge_ptr + c[None, :] * K + p[:, None]
    right = edge_ptr + (C + c[None, :]) * K + (p[:, None] - S + K)
    factor = 1.0 + tl.load(left, present & (p < K)[:, None], other=0.0)
    return factor + tl.load(right, present & (p >= S - K)[:, None], other=0.0)


@jit
def gate_kernel(
    a_ptr, s_ptr, padding_ptr, x_ptr, T, B, C, frame_stride, batch_stride, across,
    PADDED: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x = a sigmoid(s), zero on padding."""
    b, t, c, exists = place(T, C, across, FRAMES, CHANNELS)
    present = (t < T)[:, None] & exists[None, :]
    audible = present
    if PADDED:
        audible = present & (tl.load(padding_ptr + b * T + t, t < T, other=1) == 0)[:, None]
    i = t.to(tl.int64)[:, None] * frame_stride + b * batch_stride + c[None, :]
    a = tl.load(a_ptr + i, audible, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + i, audible, other=0.0).to(tl.float32)
    x = a * tl.sigmoid(s)
    tl.store(x_ptr + dense(b, t, c, B, C), x.to(x_ptr.dtype.element_ty), present)


@jit
def scale_kernel(
    dy_ptr, edge_ptr, scaled_ptr, T, B, C, S, across,
    K: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """e dy."""
    b, t, c, exists = place(T, C, across, FRAMES, CHANNELS)
    present = (t < T)[:, None] & exists[None, :]
    scaled = load_frames(dy_ptr, b, t, c, present, B, C) * edge_factor(edge_ptr, t % S, c, present, C, S, K)
    tl.store(scaled_ptr + dense(b, t, c, B, C), scaled, present)


@triton.jit
def convolve(x_ptr, weight_ptr, b, t, c, exists, T, B, C, S, shift, K: tl.constexpr, WITHIN: tl.constexpr,
             FLIPPED: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """sum_k w_k x_(t + k - shift) over K taps, w backwards if FLIPPED; inside the chunk of t only if WITHIN."""
    total = tl.zeros([FRAMES, CHANNELS], tl.float32)
    for k in range(K):
        u = t + (k - shift)
        reached = (u >= 0) & (u < T)
        if WITHIN:
            p = t % S + (k - shift)
            reached = reached & (p >= 0) & (p < S)
        tap = K - 1 - k if FLIPPED else k
        w = tl.load(weight_ptr + c * K + tap, exists, other=0.0)
        total += load_frames(x_ptr, b, u, c, reached[:, None] & exists[None, :], B, C) * w[None, :]
    return total


@jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, causal_weight_ptr, causal_bias_ptr, edge_ptr, y_ptr, T, B, C, S, across,
    K: tl.constexpr, CHUNKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAUSAL_BIAS: tl.constexpr,
    FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, t, c, exists = place(T, C, across, FRAMES, CHANNELS)
    present = (t < T)[:, None] & exists[None, :]
    y = convolve(x_ptr, weight_ptr, b, t, c, exists, T, B, C, S, K // 2, K, CHUNKED, False, FRAMES, CHANNELS)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, exists, other=0.0)[None, :]
    if CHUNKED:
        H: tl.constexpr = K // 2
        y *= edge_factor(edge_ptr, t % S, c, present, C, S, K)
        y += convolve(x_ptr, causal_weight_ptr, b, t, c, exists, T, B, C, S, H, H + 1, False, False, FRAMES, CHANNELS)
        if HAS_CAUSAL_BIAS:
            y += tl.load(causal_bias_ptr + c, exists, other=0.0)[None, :]
    tl.store(y_ptr + dense(b, t, c, B, C), y.to(y_ptr.dtype.element_ty), present)


@jit
def backward_kernel(
    dy_ptr, scaled_ptr, a_ptr, s_ptr, padding_ptr, weight_ptr, causal_weight_ptr, da_ptr, ds_ptr,
    T, B, C, S, frame_stride, batch_stride, across,
    K: tl.constexpr, CHUNKED: tl.constexpr, PADDED: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """da and ds. `scaled` is e dy, or dy where there are no chunks."""
    b, t, c, exists = place(T, C, across, FRAMES, CHANNELS)
    present = (t < T)[:, None] & exists[None, :]
    H: tl.constexpr = K // 2
    dx = convolve(scaled_ptr, weight_ptr, b, t, c, exists, T, B, C, S, H, K, CHUNKED, True, FRAMES, CHANNELS)
    if CHUNKED:
        dx += convolve(dy_ptr, causal_weight_ptr, b, t, c, exists, T, B, C, S, 0, H + 1, False, True, FRAMES, CHANNELS)
    audible = present
    if PADDED:
        audible = present & (tl.load(padding_ptr + b * T + t, t < T, other=1) == 0)[:, None]
    i = t.to(tl.int64)[:, None] * frame_stride + b * batch_stride + c[None, :]
    a = tl.load(a_ptr + i, audible, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.load(s_ptr + i, audible, other=0.0).to(tl.float32))
    da = tl.where(audible, dx * gate, 0.0)
    ds = da * a * (1.0 - gate)
    o = dense(b, t, c, B, C)
    tl.store(da_ptr + o, da.to(da_ptr.dtype.element_ty), present)
    tl.store(ds_ptr + o, ds.to(ds_ptr.dtype.element_ty), present)


@jit
def taps_kernel(
    x_ptr, d_ptr, partials_ptr, T, B, C, S, across, tiles, parts, blocks, total, weight_at, bias_at,
    K: tl.constexpr, TAPS: tl.constexpr, WITHIN: tl.constexpr,
    GROUP: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One part's share of dw_k = sum_t d_t x_(t + k - H), k < TAPS, and of db = sum_t d_t."""
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    exists = c < C
    sums = tl.zeros([GROUP, FRAMES, CHANNELS], tl.float32)
    bias = tl.zeros([FRAMES, CHANNELS], tl.float32)
    for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
        b = tile // across
        t = (tile % across).to(tl.int32) * FRAMES + tl.arange(0, FRAMES)
        d = load_frames(d_ptr, b, t, c, (t < T)[:, None] & exists[None, :], B, C)
        u = t[None, :] + (k[:, None] - K // 2)
        reached = (u >= 0) & (u < T) & (k < TAPS)[:, None]
        if WITHIN:
            p = t[None, :] % S + (k[:, None] - K // 2)
            reached = reached & (p >= 0) & (p < S)
        x = tl.load(
            x_ptr + (u.to(tl.int64)[:, :, None] * B + b) * C + c[None, None, :],
            reached[:, :, None] & exists[None, None, :],
            other=0.0,
        )
        sums += x.to(tl.float32) * d[None, :, :]
        bias += d
    share = partials_ptr + part * total
    stored = (k < TAPS)[:, None] & exists[None, :]
    tl.store(share + weight_at + c[None, :] * TAPS + k[:, None], tl.sum(sums, 1), stored)
    tl.store(share + bias_at + c, tl.sum(bias, 0), exists & (tl.program_id(1) == 0))


@jit
def edges_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, partials_ptr, T, B, C, S, chunks, parts, blocks, total, edge_at,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One part's share of the gradients of FRAMES corrections, from the frames at their positions of all chunks."""
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C
    e = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)
    p = tl.where(e < K, e, S - 2 * K + e)
    counted = (e < 2 * K) & (p >= 0) & (p < S)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, exists, other=0.0)
    sums = tl.zeros([FRAMES, CHANNELS], tl.float32)
    rows = B * chunks
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        b = row // chunks
        t = (row % chunks).to(tl.int32) * S + p
        present = counted & (t < T)
        within = bias[None, :] + tl.zeros([FRAMES, CHANNELS], tl.float32)
        within += convolve(x_ptr, weight_ptr, b, t, c, exists, T, B, C, S, K // 2, K, True, False, FRAMES, CHANNELS)
        dy = load_frames(dy_ptr, b, t, c, present[:, None] & exists[None, :], B, C)
        sums += tl.where(present[:, None], within * dy, 0.0)
    at = partials_ptr + part * total + edge_at + (e // K * C)[:, None] * K + c[None, :] * K + (e % K)[:, None]
    tl.store(at, sums, (e < 2 * K)[:, None] & exists[None, :])


class _Tiles:
    """How a pass over frames and channels is cut up."""

    def __init__(self, arguments: Arguments) -> None:
        frames, batch, channels = arguments.a.shape
        self.sizes = frames, batch, channels
        self.across = cdiv(frames, FRAMES.value)
        self.grid = batch * self.across, cdiv(channels, CHANNELS.value)
        self.constants = {"FRAMES": FRAMES.value, "CHANNELS": CHANNELS.value, "num_warps": WARPS.value}


def _gate(arguments: Arguments, tiles: _Tiles) -> Tensor:
    """The gated input, dense, in the dtype of a."""
    x = arguments.a.new_empty(arguments.a.shape)
    gate_kernel[tiles.grid](
        arguments.a,
        arguments.s,
        arguments.padding,
        x,
        *tiles.sizes,
        *arguments.a.stride()[:2],
        tiles.across,
        PADDED=arguments.padding is not None,
        **tiles.constants,
    )
    return x


def _forward(*args: Any) -> tuple[Tensor]:
    arguments = Arguments(*args)
    y = arguments.result()
    if y.numel() > 0:
        tiles = _Tiles(arguments)
        weight, bias, causal_weight, causal_bias, edge_scale = arguments.parameters
        with on_device(y):
            forward_kernel[tiles.grid](
                _gate(arguments, tiles),
                weight,
                bias,
                causal_weight,
                causal_bias,
                edge_scale,
                y,
                *tiles.sizes,
                arguments.chunk,
                tiles.across,
                K=arguments.kernel,
                CHUNKED=arguments.chunked,
                HAS_BIAS=bias is not None,
                HAS_CAUSAL_BIAS=causal_bias is not None,
                **tiles.constants,
            )
    return (y,)


def _backward(needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], *args: Any) -> tuple[Tensor | None, ...]:
    arguments = Arguments(*args)
    dy = grads[0].contiguous()
    most = PARTS_PER_MULTIPROCESSOR.value * multiprocessors(dy)
    out = Gradients(arguments, needs, arguments.parts(PART_FRAMES.value, most))
    if dy.numel() > 0:
        with on_device(dy):
            tiles = _Tiles(arguments)
            scaled = _scaled(arguments, tiles, dy) if arguments.chunked else dy
            if out.da is not None:
                _launch_inputs(arguments, tiles, dy, scaled, out)
            if out.partials is not None:
                _launch_parameters(arguments, _gate(arguments, tiles), dy, scaled, out)
    return out.returned()


def _scaled(arguments: Arguments, tiles: _Tiles, dy: Tensor) -> Tensor:
    """e dy, in float32."""
    scaled = torch.empty_like(dy, dtype=torch.float32)
    edge_scale = arguments.parameters[4]
    scale_kernel[tiles.grid](
        dy, edge_scale, scaled, *tiles.sizes, arguments.chunk, tiles.across, K=arguments.kernel, **tiles.constants
    )
    return scaled


def _launch_inputs(arguments: Arguments, tiles: _Tiles, dy: Tensor, scaled: Tensor, out: Gradients) -> None:
    weight, _, causal_weight, _, _ = arguments.parameters
    backward_kernel[tiles.grid](
        dy,
        scaled,
        arguments.a,
        arguments.s,
        arguments.padding,
        weight,
        causal_weight,
        out.da,
        out.ds,
        *tiles.sizes,
        arguments.chunk,
        *arguments.a.stride()[:2],
        tiles.across,
        K=arguments.kernel,
        CHUNKED=arguments.chunked,
        PADDED=arguments.padding is not None,
        **tiles.constants,
    )


def _launch_parameters(arguments: Arguments, x: Tensor, dy: Tensor, scaled: Tensor, out: Gradients) -> None:
    frames, batch, channels = sizes = arguments.a.shape
    kernel, chunk = arguments.kernel, arguments.chunk
    wide, tall, deep = SUM_CHANNELS.value, SUM_FRAMES.value, SUM_TAPS.value
    total, blocks = out.partials.shape[1], cdiv(channels, wide)
    weight_at, bias_at, causal_at, causal_bias_at, edge_at = (*out.offsets, 0, 0, 0)[:5]
    across = cdiv(frames, tall)
    split = out.parts, blocks, total
    constants = {"FRAMES": tall, "CHANNELS": wide, "num_warps": WARPS.value}

    def add_taps(d: Tensor, taps: int, within: bool, *places: int) -> None:
        grid = out.parts * blocks, cdiv(taps, deep)
        tiles = across, batch * across, *split
        taps_kernel[grid](x, d, out.partials, *sizes, chunk, *tiles, *places, kernel, taps, within, deep, **constants)

    add_taps(scaled, kernel, arguments.chunked, weight_at, bias_at)
    if arguments.chunked:
        add_taps(dy, kernel // 2 + 1, False, causal_at, causal_bias_at)
        weight, bias = arguments.parameters[:2]
        edges_kernel[out.parts * blocks, cdiv(2 * kernel, tall)](
            x,
            dy,
            weight,
            bias,
            out.partials,
            *sizes,
            chunk,
            cdiv(frames, chunk),
            *split,
            edge_at,
            K=kernel,
            HAS_BIAS=bias is not None,
            **constants,
        )


launchers = Launchers(partial(unsupported, GPU_DTYPES), _forward, _backward)
