"""Triton kernels of conv_module that sum over frames: the gradients of its parameters.

They read the gated input x and d, the gradient of the convolution, which `kernels.backward_kernel` has left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zipformer_kernels.core.jit import jit


@triton.jit
def dense(b, t, c, B, C):
    """Where [t, b, c] of a dense tensor lies."""
    return (t.to(tl.int64)[:, None] * B + b) * C + c[None, :]


@triton.jit
def load_frames(x_ptr, b, t, c, present, B, C):
    """x[t, b, c] in float32, zero where not `present`; x dense."""
    return tl.load(x_ptr + dense(b, t, c, B, C), present, other=0.0).to(tl.float32)


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


@jit
def add_parts_kernel(
    partials_ptr, sums_ptr, parts, total, tiles, columns, blocks, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds up (parts, total) partial sums, and (tiles, columns) that follow them; `blocks` programs take the first."""
    pid = tl.program_id(0)
    first = pid < blocks
    count = tl.where(first, parts, tiles)
    wide = tl.where(first, total, columns)
    begin = tl.where(first, 0, parts.to(tl.int64) * total)
    i = tl.where(first, pid, pid - blocks) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        at = begin + part.to(tl.int64)[:, None] * wide + i[None, :]
        sums += tl.load(partials_ptr + at, (part < count)[:, None] & (i < wide)[None, :], other=0.0)
    tl.store(sums_ptr + tl.where(first, 0, total) + i, tl.sum(sums, 0), i < wide)
