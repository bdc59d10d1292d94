"""Triton kernels of the backward pass of shared-weight attention; see kernels.py.

The gradient of the scores is made once, for all uses of the weights, a block of targets at a time, and stored in the
dtype of q. Rows lie one after the other, each behind a margin of zeros::

    ds (H, B, targets, margin + sources),  ds[i, j] at margin + j of row i

so that what is read along diagonals, element n - (T - 1) + i of row i, meets zeros where there is no such source.
Three kernels read it: for the gradients of k, of p, and of e. All sums are in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zipformer_kernels.core.jit import jit
from zipformer_kernels.ops.attention.kernels import (
    BY_SLOTS,
    VARYING,
    fill_masked,
    fill_rules,
    load_filling,
    load_largest,
    load_positions,
    load_rows,
    load_scale,
    load_window,
    make_weights,
    product,
    score_tile,
    split_program,
    store_rows,
    table_of,
)


@jit(
    do_not_specialize=["T", "S", "B", "H", "first"],
    do_not_specialize_on_alignment=["v_ptr", "g_ptr", "out_ptr", "values_ptr", "grads_ptr"],
)
def pack_kernel(
    v_ptr, v_st, v_sb, v_sh, g_ptr, g_st, g_sb, g_sh, out_ptr, out_st, out_sb, out_sh, values_ptr, grads_ptr, packed_st,
    delta_ptr, T, S, B, H, C, CHANNELS, first, BM: tl.constexpr, BC: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Lays a use's v, (S, B, H, C), and g, (T, B, H, C), into (H, B, S or T, packed_st), CHANNELS in all.

    Behind its C there are zeros. And delta[h, b, i], (H, B, T), gains sum_c g[i, c] out[i, c]; of the first use it is
    that. Without PACK there is only that, and no v.
    """
    targets = tl.cdiv(T, BM)
    block, b, h = split_program(targets + (tl.cdiv(S, BM) if PACK else 0), B, H)
    if block < targets:
        i = block * BM + tl.arange(0, BM)
        delta = tl.zeros([BM], tl.float32)
        for c0 in range(0, CHANNELS, BC):
            c = c0 + tl.arange(0, BC)
            g = load_rows(g_ptr + b * g_sb + h * g_sh, i, g_st, T, c, C)
            if PACK:
                store_rows(grads_ptr + (h * B + b) * T * packed_st, g, i, packed_st, T, c, CHANNELS)
            out = load_rows(out_ptr + b * out_sb + h * out_sh, i, out_st, T, c, C)
            delta += tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
        delta_ptr += (h * B + b) * T
        if first == 0:
            delta += tl.load(delta_ptr + i, mask=i < T, other=0.0)
        tl.store(delta_ptr + i, delta, mask=i < T)
    elif PACK:
        j = (block - targets) * BM + tl.arange(0, BM)
        for c0 in range(0, CHANNELS, BC):
            c = c0 + tl.arange(0, BC)
            v = load_rows(v_ptr + b * v_sb + h * v_sh, j, v_st, S, c, C)
            store_rows(values_ptr + (h * B + b) * S * packed_st, v, j, packed_st, S, c, CHANNELS)


@triton.jit
def weights_gradient_tile(g, g_ptr, v_ptr, i, j, T, S, packed, BC: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """sum_c g[i, c] v[j, c] over the `packed` channels of all uses, BC at a time; g is given where they are one block.

    `packed`, a multiple of 16, is the length of the rows of both.
    """
    packed = tl.multiple_of(packed, 16)
    c = tl.arange(0, BC)
    if ONE_BLOCK:
        return product(g, tl.trans(load_rows(v_ptr, j, packed, S, c, packed)))
    else:
        out = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
        for c0 in range(0, packed, BC):
            g = load_rows(g_ptr, i, packed, T, c0 + c, packed)
            out += product(g, tl.trans(load_rows(v_ptr, j, packed, S, c0 + c, packed)))
        return out


@triton.jit
def score_gradient_walk(
    q_ptr, q_st, k_ptr, k_st, p_ptr, p_st, table_ptr, largest, scale, padding_ptr, padding_sj, mask_ptr, mask_st,
    T, S, chunk, left_chunks, lead, copy, w_ptr, w_st, dw_ptr, g_ptr, v_ptr, packed, delta, penalty, limit,
    ds_ptr, ds_st, i0,
    D: tl.constexpr, D_TILE: tl.constexpr, P_TILE: tl.constexpr, TERM: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, ONE_BLOCK: tl.constexpr, STORED: tl.constexpr, DENSE: tl.constexpr, PENALIZED: tl.constexpr,
):  # fmt: skip
    """The walk of `score_gradient_kernel` over the sources.

    Returns dq and, by slots, ds B^T, (BM / 16, 16, 16 P_TILE): the term is A B (see kernels.py), and where A has p this
    has its gradient.
    """
    ROUGHLY: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    SCORES: tl.constexpr = PENALIZED or not STORED
    i = i0 + tl.arange(0, BM)
    d = tl.arange(0, D_TILE)
    if SCORES:
        q = load_rows(q_ptr, i, q_st, T, d, D)
        p = load_positions(p_ptr, p_st, i0, T, P_TILE, BM, TERM)
    g = load_rows(g_ptr, i, packed, T, tl.arange(0, BC), packed)
    dq = tl.zeros([BM, D_TILE], tl.float32)
    slots = tl.zeros([BM // 16, 16, 16 * P_TILE if TERM == BY_SLOTS else 16], tl.float32)
    row = tl.arange(0, BM)[:, None]
    for j0 in range(0, S, BN):
        j = j0 + tl.arange(0, BN)
        k = load_rows(k_ptr, j, k_st, S, d, D)
        filling = load_filling(padding_ptr, padding_sj, j, S, PADDING)
        if not STORED:
            raw = score_tile(q, k, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T, P_TILE, BM, BN, TERM)
        if STORED:
            own = (i < T)[:, None] & (j < w_st)[None, :]
            w = tl.load(w_ptr + (row * w_st + j[None, :]), mask=own, other=0.0).to(tl.float32)
        else:
            s = fill_masked(raw, i, j, filling, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK, CHUNKS)
            w = make_weights(s, largest, scale, ROUGHLY)
        dw = weights_gradient_tile(g, g_ptr, v_ptr, i, j, T, S, packed, BC, ONE_BLOCK)
        if DENSE:
            own = (i < T)[:, None] & (j < w_st)[None, :]
            dw += tl.load(dw_ptr + (row * w_st + j[None, :]), mask=own, other=0.0).to(tl.float32)
        ds = w * (dw - delta[:, None])
        ds = fill_rules(ds, 0.0, i, j, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK, CHUNKS)
        ds = tl.where((filling == 0.0)[None, :], ds, 0.0)
        if PENALIZED:
            if STORED:
                raw = score_tile(q, k, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T, P_TILE, BM, BN, TERM)
            inside = (i < T)[:, None] & (j < S)[None, :]
            ds += tl.where(inside & (raw > limit), penalty, 0.0) - tl.where(inside & (raw < -limit), penalty, 0.0)
        ds = ds.to(k.dtype)
        dq += product(ds, k)
        if TERM == BY_SLOTS:
            window = tl.permute(load_window(table_ptr, i0, j0, lead, copy, P_TILE, BM, BN), (0, 2, 1))
            slots += product(tl.reshape(ds, [BM // 16, 16, BN]), window)
        tl.store(ds_ptr + (row * ds_st + j[None, :]), ds)
    return dq, slots


@jit(do_not_specialize=[*VARYING, "first", "targets"], do_not_specialize_on_alignment=["p_ptr", "dp_ptr"])
def score_gradient_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, table_ptr, softmax_ptr,
    padding_ptr, padding_sb, padding_sj, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks, lead, copy,
    w_ptr, w_st, dw_ptr, g_ptr, v_ptr, packed, delta_ptr, penalty, limit, ds_ptr, ds_st, first, targets,
    dq_ptr, dq_st, dq_sb, dq_sh, dp_ptr, dp_st, dp_sb, dp_sh, P,
    D: tl.constexpr, D_TILE: tl.constexpr, P_TILE: tl.constexpr, TERM: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, ONE_BLOCK: tl.constexpr, MARGIN: tl.constexpr, STORED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """ds = w (dw - delta) where not masked, plus the penalty's sign(s) where |s| > limit.

    And dq[i] = sum_j ds[i, j] k[j] and, by slots, dp[i] = sum_j ds[i, j] e[T - 1 - i + j].

    Of the targets from 16 `first` on, of which ds has room for `targets`. The gradient dw of the weights is that of all
    uses, g v^T, plus, where DENSE, what `dw_ptr` has. Weights are read where STORED, else made from scores again;
    `w_ptr` and `dw_ptr` begin with target 16 `first`. Scores are needed for the penalty too, which is zero in most
    calls of training: hence a branch, and not another kernel.
    """
    block, b, h = split_program(targets // BM, B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += (b * p_sb + h * p_sh) * 4
    table_ptr = table_of(table_ptr, h, copy, P_TILE, TERM)
    padding_ptr += b * padding_sb
    mask_ptr += b * mask_sb
    bh = h * B + b
    i0 = first * 16 + block * BM
    i = i0 + tl.arange(0, BM)
    g_ptr += bh * T * packed
    v_ptr += bh * S * packed
    w_ptr += (bh * T + block * BM) * w_st
    dw_ptr += (bh * T + block * BM) * w_st
    ds_st = tl.multiple_of(ds_st, 16)
    ds_ptr += (bh * targets + block * BM) * ds_st
    delta = tl.load(delta_ptr + bh * T + i, mask=i < T, other=0.0)
    if STORED:
        largest, scale = delta, delta
    else:
        largest = load_largest(softmax_ptr + bh * T * 2, i, T)
        scale = load_scale(softmax_ptr + bh * T * 2, i, T)
    zeros = ds_ptr + (tl.arange(0, BM)[:, None] * ds_st + tl.arange(0, MARGIN)[None, :])
    tl.store(zeros, tl.zeros([BM, MARGIN], ds_ptr.dtype.element_ty))
    if tl.program_id(0) == tl.num_programs(0) - 1:  # behind the last row, where diagonals lead
        tl.store(ds_ptr + BM * ds_st + tl.arange(0, MARGIN), tl.zeros([MARGIN], ds_ptr.dtype.element_ty))
    if penalty != 0.0:
        dq, slots = score_gradient_walk(
            q_ptr, q_st, k_ptr, k_st, p_ptr, p_st, table_ptr, largest, scale, padding_ptr, padding_sj,
            mask_ptr, mask_st, T, S, chunk, left_chunks, lead, copy, w_ptr, w_st, dw_ptr, g_ptr, v_ptr, packed, delta,
            penalty, limit, ds_ptr + MARGIN, ds_st, i0,
            D, D_TILE, P_TILE, TERM, PADDING, MASK, CHUNKS, BM, BN, BC, ONE_BLOCK, STORED, DENSE, True,
        )  # fmt: skip
    else:
        dq, slots = score_gradient_walk(
            q_ptr, q_st, k_ptr, k_st, p_ptr, p_st, table_ptr, largest, scale, padding_ptr, padding_sj,
            mask_ptr, mask_st, T, S, chunk, left_chunks, lead, copy, w_ptr, w_st, dw_ptr, g_ptr, v_ptr, packed, delta,
            penalty, limit, ds_ptr + MARGIN, ds_st, i0,
            D, D_TILE, P_TILE, TERM, PADDING, MASK, CHUNKS, BM, BN, BC, ONE_BLOCK, STORED, DENSE, False,
        )  # fmt: skip
    store_rows(dq_ptr + b * dq_sb + h * dq_sh, dq, i, dq_st, T, tl.arange(0, D_TILE), D)
    if TERM == BY_SLOTS:
        r = tl.arange(0, 16)[None, :, None, None]
        by_slot = tl.reshape(slots, [BM // 16, 16, 16, P_TILE])
        dp = tl.sum(tl.where(tl.arange(0, 16)[None, None, :, None] == 15 - r, by_slot, 0.0), 2)
        store_rows(dp_ptr + b * dp_sb + h * dp_sh, tl.reshape(dp, [BM, P_TILE]), i, dp_st, T, tl.arange(0, P_TILE), P)


@jit(do_not_specialize=["T", "S", "B", "H", "first", "targets", "accumulate"])
def key_gradient_kernel(
    q_ptr, q_st, q_sb, q_sh, ds_ptr, ds_st, T, S, B, H, first, targets, accumulate, dk_ptr, dk_st, dk_sb, dk_sh,
    D: tl.constexpr, D_TILE: tl.constexpr, MARGIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk[j] = sum_i ds[i, j] q[i] over a block of targets; added to what is there where `accumulate`.

    The block is that of `score_gradient_kernel`, here and below.
    """
    first = first * 16
    block, b, h = split_program(tl.cdiv(S, BN), B, H)
    q_ptr += b * q_sb + h * q_sh
    dk_ptr += b * dk_sb + h * dk_sh
    ds_st = tl.multiple_of(ds_st, 16)
    ds_ptr += (h * B + b) * targets * ds_st + MARGIN + block * BN
    j = block * BN + tl.arange(0, BN)
    d = tl.arange(0, D_TILE)
    dk = tl.zeros([BN, D_TILE], tl.float32)
    row = tl.arange(0, BM)
    tile = row[:, None] * ds_st + tl.arange(0, BN)[None, :]
    for i0 in range(0, tl.minimum(targets, T - first), BM):
        q = load_rows(q_ptr, first + i0 + row, q_st, T, d, D)
        dk += product(tl.trans(tl.load(ds_ptr + tile)), q)
        ds_ptr += BM * ds_st
    if accumulate != 0:
        dk += load_rows(dk_ptr, j, dk_st, S, d, D)
    store_rows(dk_ptr, dk, j, dk_st, S, d, D)


@jit(do_not_specialize=["T", "S", "B", "H", "first", "targets", "lead", "copy"])
def position_query_gradient_kernel(
    table_ptr, ds_ptr, ds_st, T, S, B, H, first, targets, lead, copy, dp_ptr, dp_st, dp_sb, dp_sh,
    P: tl.constexpr, P_TILE: tl.constexpr, TERM: tl.constexpr, P_COLUMNS: tl.constexpr, MARGIN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dp[i] = sum_j ds[i, j] e[T - 1 - i + j] over a block of targets, along diagonals."""
    block, b, h = split_program(targets // BM, B, H)
    table_ptr = table_of(table_ptr, h, copy, P_TILE, TERM)
    row = tl.arange(0, BM)
    i0 = first * 16 + block * BM
    # Row r meets source column + r - (BM - 1) in this column.
    ds_ptr += ((h * B + b) * targets + block * BM) * ds_st + MARGIN - (BM - 1)
    diagonal = row[:, None] * (ds_st + 1) + tl.arange(0, BN)[None, :]
    d = tl.arange(0, P_COLUMNS)
    dp = tl.zeros([BM, P_COLUMNS], tl.float32)
    for n0 in range(0, S + BM - 1, BN):
        ds = tl.load(ds_ptr + n0 + diagonal)
        e_row = 16 * lead - BM - i0 + n0 + tl.arange(0, BN)
        e = tl.load(table_ptr + (e_row[:, None] * P_TILE + d[None, :]), mask=(d < P_TILE)[None, :], other=0.0)
        dp += product(ds, e)
    store_rows(dp_ptr + b * dp_sb + h * dp_sh, dp, i0 + row, dp_st, T, d, P)


@jit(do_not_specialize=["T", "S", "B", "H", "first", "targets", "accumulate", "de_sb", "de_sh"])
def position_gradient_kernel(
    p_ptr, p_st, p_sb, p_sh, ds_ptr, ds_st, T, S, B, H, first, targets, accumulate, de_ptr, de_sb, de_sh,
    P: tl.constexpr, P_COLUMNS: tl.constexpr, MARGIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """de[n] = sum_i ds[i, n - (T - 1) + i] p[i] over a block of targets, along diagonals; added to what is there
    where `accumulate`.

    For the offsets n that the block meets: those from T - (16 first + targets) on.
    """
    first = first * 16
    block, b, h = split_program(tl.cdiv(S + targets - 1, BN), B, H)
    p_ptr += (b * p_sb + h * p_sh) * 4
    de_ptr += b * de_sb + h * de_sh
    column = tl.arange(0, BN)
    # Source n - (T - 1) + i of the block's target i - first and offset n = T - (first + targets) + n0 + column.
    n0 = block * BN
    start = n0 - (targets - 1)
    row = tl.arange(0, BM)
    d = tl.arange(0, P_COLUMNS)
    diagonal = row[:, None] * (ds_st + 1) + column[None, :]
    # The targets whose sources start + i .. start + i + BN - 1 meet [0, S).
    begin = tl.maximum(-start - (BN - 1), 0) // BM * BM
    end = tl.minimum(S - start, tl.minimum(targets, T - first))
    ds_ptr += (h * B + b) * targets * ds_st + MARGIN + start + begin.to(tl.int64) * (ds_st + 1)
    de = tl.zeros([BN, P_COLUMNS], tl.float32)
    for i0 in range(begin, end, BM):
        p = load_rows(p_ptr, first + i0 + row, p_st * 4, T, d, P)
        de += product(tl.trans(tl.load(ds_ptr + diagonal)), p)
        ds_ptr += BM * (ds_st + 1)
    n = T - (first + targets) + n0 + column
    inside = ((n >= 0) & (n0 + column < S + targets - 1))[:, None] & (d < P)[None, :]
    at = de_ptr + n[:, None] * P + d[None, :]
    if accumulate != 0:
        de += tl.load(at, mask=inside, other=0.0)
    tl.store(at, de, mask=inside)


@jit(do_not_specialize=VARYING)
def value_gradient_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, table_ptr, softmax_ptr,
    padding_ptr, padding_sb, padding_sj, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks, lead, copy,
    g_ptr, g_st, g_sb, g_sh, dv_ptr, C,
    D: tl.constexpr, D_TILE: tl.constexpr, P_TILE: tl.constexpr, TERM: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """dv[j] = sum_i w[i, j] g[i], contiguous, for one block of BC + REST channels, as in `aggregate_kernel`."""
    block, b, h = split_program(tl.cdiv(S, BN), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += (b * p_sb + h * p_sh) * 4
    g_ptr += b * g_sb + h * g_sh
    table_ptr = table_of(table_ptr, h, copy, P_TILE, TERM)
    padding_ptr += b * padding_sb
    mask_ptr += b * mask_sb
    softmax_ptr += (h * B + b) * T * 2
    ROUGHLY: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    j0 = block * BN
    j = j0 + tl.arange(0, BN)
    d = tl.arange(0, D_TILE)
    c = tl.program_id(1) * (BC + REST) + tl.arange(0, BC)
    rest = tl.program_id(1) * (BC + REST) + BC + tl.arange(0, max(REST, 1))
    k = load_rows(k_ptr, j, k_st, S, d, D)
    dv = tl.zeros([BN, BC], tl.float32)
    more = tl.zeros([BN, max(REST, 1)], tl.float32)
    for i0 in range(0, T, BM):
        i = i0 + tl.arange(0, BM)
        q = load_rows(q_ptr, i, q_st, T, d, D)
        p = load_positions(p_ptr, p_st, i0, T, P_TILE, BM, TERM)
        s = score_tile(q, k, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T, P_TILE, BM, BN, TERM)
        filling = load_filling(padding_ptr, padding_sj, j, S, PADDING)
        s = fill_masked(s, i, j, filling, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK, CHUNKS)
        w = make_weights(s, load_largest(softmax_ptr, i, T), load_scale(softmax_ptr, i, T), ROUGHLY)
        w = tl.trans(w.to(g_ptr.dtype.element_ty))
        dv += product(w, load_rows(g_ptr, i, g_st, T, c, C))
        if REST:
            more += product(w, load_rows(g_ptr, i, g_st, T, rest, C))
    dv_ptr += (b * H + h) * C
    store_rows(dv_ptr, dv, j, B * H * C, S, c, C)
    if REST:
        store_rows(dv_ptr, more, j, B * H * C, S, rest, C)
