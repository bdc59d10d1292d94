"""Triton kernels of conv_module over frames and channels: forward, and the gradients of its inputs.

A program takes a tile of frames of one sequence by a block of channels. What the convolution reads, shifted by one tap
after another, it writes into memory of its own first, with the frames around the tile that the kernel reaches: the
gated input, or in backward the gradient of y.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zipformer_kernels.core.jit import jit
from zipformer_kernels.ops.conv_module.sum_kernels import dense
from zipformer_kernels.ops.swoosh.triton import sigmoid, swoosh_derivative, swoosh_value


@triton.jit
def place(T, C, across, FRAMES: tl.constexpr, CHANNELS: tl.constexpr):
    """The program's tile: its sequence, frames and channels, and which of the channels exist."""
    tile = tl.program_id(0)
    b = (tile // across).to(tl.int64)
    t = tile % across * FRAMES + tl.arange(0, FRAMES)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return b, t, c, c < C


@triton.jit
def edge_factor(edge_ptr, p, c, present, C, S, K: tl.constexpr):
    """e_p for positions p in their chunks, (frames, channels)."""
    left = edge_ptr + c[None, :] * K + p[:, None]
    right = edge_ptr + (C + c[None, :]) * K + (p[:, None] - S + K)
    factor = 1.0 + tl.load(left, present & (p < K)[:, None], other=0.0)
    return factor + tl.load(right, present & (p >= S - K)[:, None], other=0.0)


@triton.jit
def own_memory(ptr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where the program's (ROWS, CHANNELS) lie."""
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return ptr + program * (ROWS * CHANNELS)


@triton.jit
def within(r, CHANNELS: tl.constexpr):
    """Where rows r lie in a program's own memory."""
    return r[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]


@triton.jit
def heard(padding_ptr, b, t, T, PADDED: tl.constexpr):
    """Whether frames t exist, and are no padding."""
    exists = (t >= 0) & (t < T)
    if PADDED:
        exists = exists & (tl.load(padding_ptr + b * T + t, exists, other=1) == 0)
    return exists


@triton.jit
def convolve(rows_ptr, weight_ptr, c, exists, p, S, shift, K: tl.constexpr, INSIDE: tl.constexpr,
             FLIPPED: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """sum_k w_k row_(i + k) over K taps, w backwards if FLIPPED.

    Frames are at p of their chunks of S, row_0 is `shift` frames before the first; frames of other chunks are left out
    if INSIDE.
    """
    total = tl.zeros([FRAMES, CHANNELS], tl.float32)
    rows = rows_ptr + within(tl.arange(0, FRAMES), CHANNELS)
    for k in range(K):
        tap = K - 1 - k if FLIPPED else k
        w = tl.load(weight_ptr + c * K + tap, exists, other=0.0)
        x = tl.load(rows + k * CHANNELS).to(tl.float32)
        if INSIDE:
            q = p + (k - shift)
            x = tl.where(((q >= 0) & (q < S))[:, None], x, 0.0)
        total += x * w[None, :]
    return total


@jit
def forward_kernel(
    a_ptr, s_ptr, padding_ptr, x_bias_ptr, weight_ptr, bias_ptr, causal_weight_ptr, causal_bias_ptr, edge_ptr,
    y_ptr, activated_ptr, own_ptr, T, B, C, S, frame_stride, batch_stride, across,
    K: tl.constexpr, CHUNKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAUSAL_BIAS: tl.constexpr,
    PADDED: tl.constexpr, BIASED: tl.constexpr, STORES: tl.constexpr, ACTIVATES: tl.constexpr,
    SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, FILL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y if STORES, SwooshR(y) if ACTIVATES; a and s with the projection's bias if BIASED."""
    b, t, c, exists = place(T, C, across, FRAMES, CHANNELS)
    H: tl.constexpr = K // 2
    own = own_memory(own_ptr, ROWS, CHANNELS)
    t0 = tl.program_id(0) % across * FRAMES - H
    for first in range(0, ROWS, FILL):
        r = first + tl.arange(0, FILL)
        u = t0 + r
        present = heard(padding_ptr, b, u, T, PADDED)[:, None] & exists[None, :]
        i = u.to(tl.int64)[:, None] * frame_stride + b * batch_stride + c[None, :]
        a = tl.load(a_ptr + i, present, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + i, present, other=0.0).to(tl.float32)
        if BIASED:
            a += tl.load(x_bias_ptr + c, exists, other=0.0).to(tl.float32)[None, :]
            s += tl.load(x_bias_ptr + C + c, exists, other=0.0).to(tl.float32)[None, :]
            a = tl.where(present, a, 0.0)
        tl.store(own + within(r, CHANNELS), (a * sigmoid(s)).to(own_ptr.dtype.element_ty))
    tl.debug_barrier()

    p = t % S
    y = convolve(own, weight_ptr, c, exists, p, S, H, K, CHUNKED, False, FRAMES, CHANNELS)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, exists, other=0.0)[None, :]
    present = (t < T)[:, None] & exists[None, :]
    if CHUNKED:
        y *= edge_factor(edge_ptr, p, c, present, C, S, K)
        y += convolve(own, causal_weight_ptr, c, exists, p, S, H, H + 1, False, False, FRAMES, CHANNELS)
        if HAS_CAUSAL_BIAS:
            y += tl.load(causal_bias_ptr + c, exists, other=0.0)[None, :]
    o = dense(b, t, c, B, C)
    if STORES:
        tl.store(y_ptr + o, y.to(y_ptr.dtype.element_ty), present)
    if ACTIVATES:
        activated = swoosh_value(y, SHIFT, OFFSET)
        tl.store(activated_ptr + o, activated.to(activated_ptr.dtype.element_ty), present)


@jit
def backward_kernel(
    dy_ptr, y_ptr, a_ptr, s_ptr, padding_ptr, weight_ptr, causal_weight_ptr, edge_ptr,
    da_ptr, ds_ptr, activated_ptr, x_ptr, d_ptr, scaled_ptr, sums_ptr, own_ptr, own_scaled_ptr,
    T, B, C, S, frame_stride, batch_stride, step, across,
    K: tl.constexpr, CHUNKED: tl.constexpr, PADDED: tl.constexpr, ACTIVATED: tl.constexpr, INPUTS: tl.constexpr,
    PARAMETERS: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, FILL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """da, ds and their sums if INPUTS; SwooshR(y) if ACTIVATED, where dy is its gradient; for PARAMETERS x and d = dy.

    In chunks also e dy.
    """
    b, t, c, exists = place(T, C, across, FRAMES, CHANNELS)
    H: tl.constexpr = K // 2
    own = own_memory(own_ptr, ROWS, CHANNELS)
    own_scaled = own_memory(own_scaled_ptr, ROWS, CHANNELS)
    t0 = tl.program_id(0) % across * FRAMES - H
    for first in range(0, ROWS, FILL):
        r = first + tl.arange(0, FILL)
        u = t0 + r
        present = ((u >= 0) & (u < T))[:, None] & exists[None, :]
        o = dense(b, u, c, B, C)
        mine = present & ((r >= H) & (r < H + FRAMES))[:, None]
        d = tl.load(dy_ptr + o, present, other=0.0).to(tl.float32)
        if ACTIVATED:
            y = tl.load(y_ptr + o, present, other=0.0).to(tl.float32)
            d *= swoosh_derivative(y, SHIFT)
            activated = swoosh_value(y, SHIFT, OFFSET)
            tl.store(activated_ptr + o, activated.to(activated_ptr.dtype.element_ty), mine)
            if PARAMETERS:
                tl.store(d_ptr + o, d.to(d_ptr.dtype.element_ty), mine)
        tl.store(own + within(r, CHANNELS), d.to(own_ptr.dtype.element_ty))
        if CHUNKED:
            d *= edge_factor(edge_ptr, (u + S) % S, c, present, C, S, K)
            tl.store(own_scaled + within(r, CHANNELS), d)
            if PARAMETERS:
                tl.store(scaled_ptr + o, d, mine)
    tl.debug_barrier()

    audible = heard(padding_ptr, b, t, T, PADDED)[:, None] & exists[None, :]
    i = t.to(tl.int64)[:, None] * frame_stride + b * batch_stride + c[None, :]
    present = (t < T)[:, None] & exists[None, :]
    p = t % S
    if INPUTS:
        if CHUNKED:
            dx = convolve(own_scaled, weight_ptr, c, exists, p, S, H, K, True, True, FRAMES, CHANNELS)
            late = own + H * CHANNELS
            dx += convolve(late, causal_weight_ptr, c, exists, p, S, 0, H + 1, False, True, FRAMES, CHANNELS)
        else:
            dx = convolve(own, weight_ptr, c, exists, p, S, H, K, False, True, FRAMES, CHANNELS)
        a = tl.load(a_ptr + i, audible, other=0.0).to(tl.float32)
        gate = sigmoid(tl.load(s_ptr + i, audible, other=0.0).to(tl.float32))
        da = tl.where(audible, dx * gate, 0.0)
        ds = da * a * (1.0 - gate)
        to = (t.to(tl.int64)[:, None] * B + b) * step + c[None, :]
        tl.store(da_ptr + to, da.to(da_ptr.dtype.element_ty), present)
        tl.store(ds_ptr + to, ds.to(ds_ptr.dtype.element_ty), present)
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + c
        tl.store(sums, tl.sum(da, 0), exists)
        tl.store(sums + C, tl.sum(ds, 0), exists)
    if PARAMETERS:
        a = tl.load(a_ptr + i, audible, other=0.0).to(tl.float32)
        gate = sigmoid(tl.load(s_ptr + i, audible, other=0.0).to(tl.float32))
        tl.store(x_ptr + dense(b, t, c, B, C), (a * gate).to(x_ptr.dtype.element_ty), present)
