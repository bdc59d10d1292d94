"""Triton's matrix products of rows, each with what is done to its result while that is in registers.

A program makes one tile of a result, BM rows by BN channels, from BK channels of both operands at a time. Programs that
share rows follow each other, so that the rows come from memory once: weights stay in the L2 cache, for those of the
widest preset take 6 MB.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zipformer_kernels.core.jit import jit
from zipformer_kernels.ops.swoosh.triton import swoosh_derivative, swoosh_value

VARYING = ["rows", "B"]  # lengths and batches differ from call to call: nothing is compiled again for them


@triton.jit
def place(rows, N, BM: tl.constexpr, BN: tl.constexpr):
    """The program's tile: its first row, its rows and columns, and how many rows there are from the first on."""
    across = tl.cdiv(N, BN)
    m = tl.program_id(0) // across * BM
    return m, tl.arange(0, BM), tl.program_id(0) % across * BN + tl.arange(0, BN), rows - m


@triton.jit
def columns(N, quarter, BN: tl.constexpr):
    """The columns of a quarter of the program's tile."""
    return tl.program_id(0) % tl.cdiv(N, BN) * BN + quarter * (BN // 4) + tl.arange(0, BN // 4)


@triton.jit
def elements(m, r, c, left, N):
    """The elements of a tile in a tensor of N channels, and which of them exist."""
    return m.to(tl.int64) * N + (r[:, None] * N + c[None, :]), (r < left)[:, None] & (c < N)[None, :]


@triton.jit
def sequence(m, r, B):
    """The sequences of a tile's rows, (m + r) % B, by a quotient in float32, which is right for B up to 2^19."""
    row = m % B + r
    return row - ((row.to(tl.float32) + 0.5) * (1.0 / B)).to(tl.int32) * B


@triton.jit
def product(
    x_ptr,
    w_ptr,
    m,
    r,
    c,
    left,
    N,
    K,
    w_sn,
    w_sk,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The tile of x W^T in float32; W has strides w_sn of a result's channel and w_sk of an operand's.

    Rows and channels behind the last are read as others are, and not stored.
    """
    k = tl.arange(0, BK)
    columns = c if WHOLE_N else c % N
    x_ptrs = x_ptr + m.to(tl.int64) * K + (tl.minimum(r, left - 1)[:, None] * K + k[None, :])
    w_ptrs = w_ptr + (columns[None, :] * w_sn + k[:, None] * w_sk)
    tile = tl.zeros([BM, BN], tl.float32)
    for done in range(0, K, BK):
        if WHOLE_K:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, (k < K - done)[None, :], other=0.0)
            w = tl.load(w_ptrs, (k < K - done)[:, None], other=0.0)
        tile = tl.dot(x, w, tile)
        x_ptrs += BK
        w_ptrs += BK * w_sk
    return tile


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """A tile's columns in two tiles."""
    return tl.split(tl.permute(tl.reshape(tile, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit
def quarters(tile, BM: tl.constexpr, BN: tl.constexpr):
    """A tile's columns in four tiles: what is done to one after the other takes a quarter of the registers."""
    left, right = halves(tile, BM, BN)
    first, second = halves(left, BM, BN // 2)
    third, fourth = halves(right, BM, BN // 2)
    return first, second, third, fourth


@triton.jit
def mask_of(draws_ptr, rate, factor, m, r, c, B, N, inside):
    """The mask of a tile, by the draws of each row's sequence, (B, N); 1 where there is none."""
    if draws_ptr is None:
        mask = 1.0
    else:
        draws = tl.load(draws_ptr + (sequence(m, r, B)[:, None] * N + c[None, :]), inside, other=0.0).to(tl.float32)
        mask = tl.where(draws > rate, factor, 0.0)
    return mask


@triton.jit
def store_sums(sums_ptr, value, m, c, N, inside, BM: tl.constexpr):
    """The sums of a tile's columns, to the part of its rows."""
    tl.store(sums_ptr + (m // BM).to(tl.int64) * N + c, tl.sum(tl.where(inside, value, 0.0), 0), c < N)


@jit(do_not_specialize=VARYING)
def activated_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    draws_ptr,
    rate,
    factor,
    hidden_ptr,
    a_ptr,
    rows,
    B,
    N,
    K,
    w_sn,
    w_sk,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden = x W^T + b, unless it is not wanted, and a = mask * swoosh(hidden)."""
    m, r, c, left = place(rows, N, BM, BN)
    low = a_ptr.dtype.element_ty
    tile = product(x_ptr, w_ptr, m, r, c, left, N, K, w_sn, w_sk, WHOLE_N, WHOLE_K, BM, BN, BK)
    q0, q1, q2, q3 = quarters(tile, BM, BN)
    for q in tl.static_range(4):
        c = columns(N, q, BN)
        i, inside = elements(m, r, c, left, N)
        hidden = q0 if q == 0 else q1 if q == 1 else q2 if q == 2 else q3
        if bias_ptr is not None:
            hidden += tl.load(bias_ptr + c, c < N, other=0.0).to(tl.float32)[None, :]
        hidden = hidden.to(low)  # as backward will read it
        if hidden_ptr is not None:
            tl.store(hidden_ptr + i, hidden, inside)
        a = swoosh_value(hidden.to(tl.float32), SHIFT, OFFSET) * mask_of(draws_ptr, rate, factor, m, r, c, B, N, inside)
        tl.store(a_ptr + i, a.to(low), inside)


@jit(do_not_specialize=VARYING)
def activated_gradient_kernel(
    grad_ptr,
    w_ptr,
    hidden_ptr,
    draws_ptr,
    rate,
    factor,
    dhidden_ptr,
    a_ptr,
    sums_ptr,
    rows,
    B,
    N,
    K,
    w_sn,
    w_sk,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dhidden = (grad W) * mask * swoosh'(hidden) with its sums, and a = mask * swoosh(hidden)."""
    m, r, c, left = place(rows, N, BM, BN)
    low = a_ptr.dtype.element_ty
    da = product(grad_ptr, w_ptr, m, r, c, left, N, K, w_sn, w_sk, WHOLE_N, WHOLE_K, BM, BN, BK).to(low)
    q0, q1, q2, q3 = quarters(da, BM, BN)
    for q in tl.static_range(4):
        c = columns(N, q, BN)
        i, inside = elements(m, r, c, left, N)
        hidden = tl.load(hidden_ptr + i, inside, other=0.0).to(tl.float32)
        mask = mask_of(draws_ptr, rate, factor, m, r, c, B, N, inside)
        tl.store(a_ptr + i, (swoosh_value(hidden, SHIFT, OFFSET) * mask).to(low), inside)
        # Read again: the mask kept takes so many registers that one program fills a multiprocessor of an H100.
        mask = mask_of(draws_ptr, rate, factor, m, r, c, B, N, inside)
        da = q0 if q == 0 else q1 if q == 1 else q2 if q == 2 else q3
        dhidden = da.to(tl.float32) * mask * swoosh_derivative(hidden, SHIFT)
        tl.store(dhidden_ptr + i, dhidden.to(low), inside)
        store_sums(sums_ptr, dhidden, m, c, N, inside, BM)


@jit(do_not_specialize=VARYING)
def added_kernel(
    src_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    chosen_ptr,
    y_ptr,
    low_ptr,
    sums_ptr,
    rows,
    B,
    N,
    K,
    w_sn,
    w_sk,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = src + chosen * (x W^T + b), the same in low precision, and its sums: all but y only where they are wanted."""
    m, r, c, left = place(rows, N, BM, BN)
    tile = product(x_ptr, w_ptr, m, r, c, left, N, K, w_sn, w_sk, WHOLE_N, WHOLE_K, BM, BN, BK)
    q0, q1, q2, q3 = quarters(tile, BM, BN)
    for q in tl.static_range(4):
        c = columns(N, q, BN)
        i, inside = elements(m, r, c, left, N)
        y = q0 if q == 0 else q1 if q == 1 else q2 if q == 2 else q3
        if bias_ptr is not None:
            y += tl.load(bias_ptr + c, c < N, other=0.0).to(tl.float32)[None, :]
        if chosen_ptr is not None:
            y *= tl.load(chosen_ptr + sequence(m, r, B)).to(tl.float32)[:, None]
        y += tl.load(src_ptr + i, inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), inside)
        if low_ptr is not None:
            tl.store(low_ptr + i, y.to(low_ptr.dtype.element_ty), inside)
        if sums_ptr is not None:
            store_sums(sums_ptr, y, m, c, N, inside, BM)


@triton.jit
def store_total(sums_ptr, total_ptr, block, parts, N, BN: tl.constexpr, PARTS: tl.constexpr):
    """The sum of all parts of some columns."""
    c, p = block * BN + tl.arange(0, BN), tl.arange(0, PARTS)
    total = tl.zeros([BN], tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + p).to(tl.int64)[:, None] * N + c[None, :]
        total += tl.sum(tl.load(sums_ptr + part, (first + p < parts)[:, None] & (c < N)[None, :], other=0.0), 0)
    tl.store(total_ptr + c, total, c < N)


@jit(do_not_specialize=["parts", "other_parts"])
def totals_kernel(
    sums_ptr,
    total_ptr,
    parts,
    N,
    other_sums_ptr,
    other_total_ptr,
    other_parts,
    other_N,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The sums of all parts, of one tensor and of another, if there is one."""
    block, blocks = tl.program_id(0), tl.cdiv(N, BN)
    if other_sums_ptr is None:
        store_total(sums_ptr, total_ptr, block, parts, N, BN, PARTS)
    else:
        if block < blocks:
            store_total(sums_ptr, total_ptr, block, parts, N, BN, PARTS)
        else:
            store_total(other_sums_ptr, other_total_ptr, block - blocks, other_parts, other_N, BN, PARTS)


@jit(do_not_specialize=VARYING)
def lowered_kernel(grad_ptr, chosen_ptr, low_ptr, sums_ptr, rows, B, N, BM: tl.constexpr, BN: tl.constexpr):
    """chosen * grad in low precision, unless it is not wanted, and its sums."""
    m, r, c, left = place(rows, N, BM, BN)
    i, inside = elements(m, r, c, left, N)
    grad = tl.load(grad_ptr + i, inside, other=0.0).to(tl.float32)
    if chosen_ptr is not None:
        grad *= tl.load(chosen_ptr + sequence(m, r, B)).to(tl.float32)[:, None]
    if low_ptr is not None:
        tl.store(low_ptr + i, grad.to(low_ptr.dtype.element_ty), inside)
    store_sums(sums_ptr, grad, m, c, N, inside, BM)
