"""Triton kernels of shared-weight attention; `attention` and `nonlin_attention` launch them.

No kernel stores a tensor of T x S elements: scores are computed again wherever they are needed, from q, k, p, e, and
turned into weights by two numbers that are saved for each target. The term p_i . e[T - 1 - i + j] is read by index:
there is no row of T + S - 1 scores to skew. Shapes are as in reference.py; `GATED` kernels take values x tanh(s) and
gate results by y.

One program covers BM targets of one sequence and head and walks over sources BN at a time (or the other way round).
Products of float32 are not rounded to TF32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MASKED_SCORE = tl.constexpr(-1000.0)

VARYING = ["T", "S", "B", "chunk", "left_chunks", "mask_sb", "mask_st", "p_st", "p_sb", "p_sh"]
"""Arguments for whose special values, 1 and multiples of 16, a kernel is not compiled again.

They differ from batch to batch; those of p also between weights and constant ones.
"""


@triton.jit
def split_program(blocks, B, H):
    """The program's block of rows, sequence and head, from axis 0 of the grid; 64-bit."""
    program = tl.program_id(0).to(tl.int64)
    bh = program // blocks
    return (program % blocks).to(tl.int32), bh // H, bh % H


@triton.jit
def load_rows(ptr, rows, stride, count, channels, C):
    """A tile (rows, channels) from rows of `stride` elements; zero outside of [0, count) x [0, C)."""
    inside = ((rows >= 0) & (rows < count))[:, None] & (channels < C)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, tile, rows, stride, count, channels, C):
    """Stores a tile (rows, channels), in the element type of `ptr`, where inside of [0, count) x [0, C)."""
    inside = (rows < count)[:, None] & (channels < C)[None, :]
    offsets = rows[:, None].to(tl.int64) * stride + channels[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b):
    """Matrix product accumulated in float32, exact to float32 for float32 inputs."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def row_products(
    a_ptr, a_rows, a_stride, a_count, b_ptr, b_rows, b_stride, b_count, C, BC: tl.constexpr, ONE_BLOCK: tl.constexpr
):
    """out[r, s] = sum_c a[r, c] b[s, c], over C channels, BC at a time; C <= BC where they are one block."""
    c = tl.arange(0, BC)
    if ONE_BLOCK:
        a = load_rows(a_ptr, a_rows, a_stride, a_count, c, C)
        return product(a, tl.trans(load_rows(b_ptr, b_rows, b_stride, b_count, c, C)))
    out = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for c0 in range(0, C, BC):
        a = load_rows(a_ptr, a_rows, a_stride, a_count, c0 + c, C)
        out += product(a, tl.trans(load_rows(b_ptr, b_rows, b_stride, b_count, c0 + c, C)))
    return out


@triton.jit
def complete_scores(
    s, i, j, b, p_ptr, p_st, e_ptr, padding_ptr, mask_ptr, mask_sb, mask_st, T, S, chunk, left_chunks,
    P: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Adds the positional term to s = q . k and applies the masks.

    `i` and `j` are targets and sources as indices that broadcast to the tile, in either orientation. Returns the scores
    before masking, after masking (-inf outside of the matrix), and where they are masked.
    """
    inside = (i < T) & (j >= 0) & (j < S)
    offset = T - 1 - i + j
    for d in tl.static_range(P):
        pd = tl.load(p_ptr + i.to(tl.int64) * p_st + d, mask=i < T, other=0.0).to(tl.float32)
        ed = tl.load(e_ptr + d * (T + S - 1) + offset, mask=inside, other=0.0).to(tl.float32)
        s += pd * ed
    masked = (i < 0) | (j < 0)  # all false: has the tile's shape
    if PADDING:
        masked |= tl.load(padding_ptr + b * S + j, mask=(j >= 0) & (j < S), other=0) != 0
    if MASK:
        masked |= tl.load(mask_ptr + b * mask_sb + i.to(tl.int64) * mask_st + j, mask=inside, other=0) != 0
    if CHUNKS:
        masked |= (j // chunk > i // chunk) | (j // chunk < i // chunk - left_chunks)
    return s, tl.where(inside, tl.where(masked, MASKED_SCORE, s), float("-inf")), masked


@triton.jit
def load_largest(softmax_ptr, i, T):
    """The largest score of targets i."""
    return tl.load(softmax_ptr + 2 * i, mask=i < T, other=0.0)


@triton.jit
def load_scale(softmax_ptr, i, T):
    """The scale of targets i: weights are exp(s - largest) scale."""
    return tl.load(softmax_ptr + 2 * i + 1, mask=i < T, other=0.0)


@triton.jit(do_not_specialize=[*VARYING, "H"])  # of all heads, and of one where weights are constant
def softmax_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, e_ptr, softmax_ptr,
    padding_ptr, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks,
    D: tl.constexpr, D_TILE: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The largest score of each target and 1 / sum_j exp(s - largest), online over the sources: (H, B, T, 2)."""
    block, b, h = split_program(tl.cdiv(T, BM), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += b * p_sb + h * p_sh
    e_ptr += h * P * (T + S - 1)
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, D_TILE)
    q = load_rows(q_ptr, i, q_st, T, d, D)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for j0 in range(0, S, BN):
        j = j0 + tl.arange(0, BN)
        k = load_rows(k_ptr, j, k_st, S, d, D)
        _, s, _ = complete_scores(
            product(q, tl.trans(k)), i[:, None], j[None, :], b, p_ptr, p_st, e_ptr, padding_ptr,
            mask_ptr, mask_sb, mask_st, T, S, chunk, left_chunks, P, PADDING, MASK, CHUNKS,
        )  # fmt: skip
        # Rows beyond T see only -inf; zero in its place keeps their arithmetic finite.
        new = tl.maximum(largest, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2((largest - shift) * LOG2E) + tl.sum(tl.exp2((s - shift[:, None]) * LOG2E), 1)
        largest = new
    softmax_ptr += (h * B + b) * T * 2
    tl.store(softmax_ptr + 2 * i, largest, mask=i < T)
    tl.store(softmax_ptr + 2 * i + 1, 1.0 / tl.where(total == 0.0, 1.0, total), mask=i < T)


@triton.jit(do_not_specialize=VARYING)
def aggregate_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, e_ptr, softmax_ptr,
    padding_ptr, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks,
    v_ptr, v_st, v_sb, v_sh, gate_ptr, out_ptr, y_ptr, gated_ptr,
    C, D: tl.constexpr, D_TILE: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """out[i] = sum_j w[i, j] v[j] for one block of BC channels; gated: v = x tanh(gate), and gated = out * y.

    `gate` and `y` share the strides of `v`; `out` and `gated` are contiguous.
    """
    block, b, h = split_program(tl.cdiv(T, BM), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += b * p_sb + h * p_sh
    e_ptr += h * P * (T + S - 1)
    v_offset = b * v_sb + h * v_sh
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, D_TILE)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    q = load_rows(q_ptr, i, q_st, T, d, D)
    largest = load_largest(softmax_ptr + (h * B + b) * T * 2, i, T)
    sums = tl.zeros([BM, BC], tl.float32)
    for j0 in range(0, S, BN):
        j = j0 + tl.arange(0, BN)
        k = load_rows(k_ptr, j, k_st, S, d, D)
        _, s, _ = complete_scores(
            product(q, tl.trans(k)), i[:, None], j[None, :], b, p_ptr, p_st, e_ptr, padding_ptr,
            mask_ptr, mask_sb, mask_st, T, S, chunk, left_chunks, P, PADDING, MASK, CHUNKS,
        )  # fmt: skip
        w = tl.exp2((s - largest[:, None]) * LOG2E)
        v = load_rows(v_ptr + v_offset, j, v_st, S, c, C)
        if GATED:
            gate = load_rows(gate_ptr + v_offset, j, v_st, S, c, C).to(tl.float32)
            v = (v.to(tl.float32) * tanh(gate)).to(v_ptr.dtype.element_ty)
        sums += product(w.to(v.dtype), v)
    sums *= load_scale(softmax_ptr + (h * B + b) * T * 2, i, T)[:, None]
    offset = (b * H + h) * C
    store_rows(out_ptr + offset, sums, i, B * H * C, T, c, C)
    if GATED:
        y = load_rows(y_ptr + v_offset, i, v_st, T, c, C).to(tl.float32)
        store_rows(gated_ptr + offset, sums * y, i, B * H * C, T, c, C)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    grad_ptr, grad_st, grad_sb, grad_sh, out_ptr, delta_ptr, x_ptr, gate_ptr, y_ptr, v_st, v_sb, v_sh,
    inner_ptr, dy_ptr, values_ptr, T, B, H, C, BM: tl.constexpr, BC: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """delta[h, b, i] = sum_c g[i, c] out[i, c] with g the gradient of `out`, before the other backward kernels.

    Gated: g = grad * y, stored as `inner`; and dy = grad * out; and the values x tanh(gate) once more.
    """
    block, b, h = split_program(tl.cdiv(T, BM), B, H)
    i = block * BM + tl.arange(0, BM)
    offset = (b * H + h) * C
    v_offset = b * v_sb + h * v_sh
    delta = tl.zeros([BM], tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        g = load_rows(grad_ptr + b * grad_sb + h * grad_sh, i, grad_st, T, c, C).to(tl.float32)
        out = load_rows(out_ptr + offset, i, B * H * C, T, c, C).to(tl.float32)
        if GATED:
            store_rows(dy_ptr + offset, g * out, i, B * H * C, T, c, C)
            g *= load_rows(y_ptr + v_offset, i, v_st, T, c, C).to(tl.float32)
            store_rows(inner_ptr + offset, g, i, B * H * C, T, c, C)
            x = load_rows(x_ptr + v_offset, i, v_st, T, c, C).to(tl.float32)
            gate = load_rows(gate_ptr + v_offset, i, v_st, T, c, C).to(tl.float32)
            store_rows(values_ptr + offset, x * tanh(gate), i, B * H * C, T, c, C)
        delta += tl.sum(g * out, 1)
    tl.store(delta_ptr + (h * B + b) * T + i, delta, mask=i < T)


@triton.jit
def score_gradient(w, raw, masked, dw, delta, penalty, limit):
    """ds = w (dw - delta) where not masked, plus the penalty's sign(s) where |s| > limit.

    The penalty is zero in most calls of training, and others follow: hence a branch, and not a kernel for each.
    """
    ds = tl.where(masked, 0.0, w * (dw - delta))
    if penalty != 0.0:
        ds += tl.where(raw > limit, penalty, 0.0) - tl.where(raw < -limit, penalty, 0.0)
    return ds


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, e_ptr, softmax_ptr,
    padding_ptr, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks,
    v_ptr, v_st, v_sb, v_sh, g_ptr, g_st, g_sb, g_sh, delta_ptr, penalty, limit, dq_ptr, dp_ptr,
    C, D: tl.constexpr, D_TILE: tl.constexpr, P: tl.constexpr, P_TILE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dq[i] = sum_j ds[i, j] k[j] and dp[i] = sum_j ds[i, j] e[T - 1 - i + j]; both contiguous."""
    block, b, h = split_program(tl.cdiv(T, BM), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += b * p_sb + h * p_sh
    v_ptr += b * v_sb + h * v_sh
    g_ptr += b * g_sb + h * g_sh
    e_ptr += h * P * (T + S - 1)
    i = block * BM + tl.arange(0, BM)
    d = tl.arange(0, D_TILE)
    pd = tl.arange(0, P_TILE)
    q = load_rows(q_ptr, i, q_st, T, d, D)
    softmax_ptr += (h * B + b) * T * 2
    largest, scale = load_largest(softmax_ptr, i, T), load_scale(softmax_ptr, i, T)
    delta = tl.load(delta_ptr + (h * B + b) * T + i, mask=i < T, other=0.0)
    dq = tl.zeros([BM, D_TILE], tl.float32)
    dp = tl.zeros([BM, P_TILE], tl.float32)
    for j0 in range(0, S, BN):
        j = j0 + tl.arange(0, BN)
        k = load_rows(k_ptr, j, k_st, S, d, D)
        raw, s, masked = complete_scores(
            product(q, tl.trans(k)), i[:, None], j[None, :], b, p_ptr, p_st, e_ptr, padding_ptr,
            mask_ptr, mask_sb, mask_st, T, S, chunk, left_chunks, P, PADDING, MASK, CHUNKS,
        )  # fmt: skip
        dw = row_products(g_ptr, i, g_st, T, v_ptr, j, v_st, S, C, BC, ONE_BLOCK)
        w = tl.exp2((s - largest[:, None]) * LOG2E) * scale[:, None]
        ds = score_gradient(w, raw, masked, dw, delta[:, None], penalty, limit)
        dq += product(ds.to(k.dtype), k)
        offset = T - 1 - i[:, None] + j[None, :]
        inside = (i < T)[:, None] & (j < S)[None, :]
        for n in tl.static_range(P):
            en = tl.load(e_ptr + n * (T + S - 1) + offset, mask=inside, other=0.0).to(tl.float32)
            dp += tl.where((pd == n)[None, :], tl.sum(ds * en, 1)[:, None], 0.0)
    store_rows(dq_ptr + (b * H + h) * D, dq, i, B * H * D, T, d, D)
    if P > 0:
        store_rows(dp_ptr + (b * H + h) * P, dp, i, B * H * P, T, pd, P)


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, e_ptr, softmax_ptr,
    padding_ptr, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks,
    v_ptr, v_st, v_sb, v_sh, g_ptr, g_st, g_sb, g_sh, delta_ptr, penalty, limit, dk_ptr, dv_ptr,
    C, D: tl.constexpr, D_TILE: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dk[j] = sum_i ds[i, j] q[i], and where one block holds all channels dv[j] = sum_i w[i, j] g[i]; contiguous."""
    block, b, h = split_program(tl.cdiv(S, BN), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += b * p_sb + h * p_sh
    v_ptr += b * v_sb + h * v_sh
    g_ptr += b * g_sb + h * g_sh
    e_ptr += h * P * (T + S - 1)
    softmax_ptr += (h * B + b) * T * 2
    delta_ptr += (h * B + b) * T
    j = block * BN + tl.arange(0, BN)
    d = tl.arange(0, D_TILE)
    k = load_rows(k_ptr, j, k_st, S, d, D)
    c = tl.arange(0, BC)
    dk = tl.zeros([BN, D_TILE], tl.float32)
    dv = tl.zeros([BN, BC], tl.float32)
    for i0 in range(0, T, BM):
        i = i0 + tl.arange(0, BM)
        q = load_rows(q_ptr, i, q_st, T, d, D)
        largest, scale = load_largest(softmax_ptr, i, T), load_scale(softmax_ptr, i, T)
        raw, s, masked = complete_scores(
            product(k, tl.trans(q)), i[None, :], j[:, None], b, p_ptr, p_st, e_ptr, padding_ptr,
            mask_ptr, mask_sb, mask_st, T, S, chunk, left_chunks, P, PADDING, MASK, CHUNKS,
        )  # fmt: skip
        w = tl.exp2((s - largest[None, :]) * LOG2E) * scale[None, :]
        dw = row_products(v_ptr, j, v_st, S, g_ptr, i, g_st, T, C, BC, ONE_BLOCK)
        if ONE_BLOCK:
            g = load_rows(g_ptr, i, g_st, T, c, C)
            dv += product(w.to(g.dtype), g)
        delta = tl.load(delta_ptr + i, mask=i < T, other=0.0)
        ds = score_gradient(w, raw, masked, dw, delta[None, :], penalty, limit)
        dk += product(ds.to(q.dtype), q)
    store_rows(dk_ptr + (b * H + h) * D, dk, j, B * H * D, S, d, D)
    if ONE_BLOCK:
        store_rows(dv_ptr + (b * H + h) * C, dv, j, B * H * C, S, c, C)


@triton.jit(do_not_specialize=VARYING)
def value_gradient_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, e_ptr, softmax_ptr,
    padding_ptr, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks,
    x_ptr, gate_ptr, x_st, x_sb, x_sh, g_ptr, g_st, g_sb, g_sh, dv_ptr, dgate_ptr,
    C, D: tl.constexpr, D_TILE: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dv[j] = sum_i w[i, j] g[i] for one block of BC channels, contiguous.

    Gated: dv is the gradient of x tanh(gate); written are dx = dv tanh(gate) and dgate = dv x (1 - tanh(gate)^2).
    """
    block, b, h = split_program(tl.cdiv(S, BN), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += b * p_sb + h * p_sh
    g_ptr += b * g_sb + h * g_sh
    e_ptr += h * P * (T + S - 1)
    softmax_ptr += (h * B + b) * T * 2
    j = block * BN + tl.arange(0, BN)
    d = tl.arange(0, D_TILE)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    k = load_rows(k_ptr, j, k_st, S, d, D)
    dv = tl.zeros([BN, BC], tl.float32)
    for i0 in range(0, T, BM):
        i = i0 + tl.arange(0, BM)
        q = load_rows(q_ptr, i, q_st, T, d, D)
        largest, scale = load_largest(softmax_ptr, i, T), load_scale(softmax_ptr, i, T)
        _, s, _ = complete_scores(
            product(k, tl.trans(q)), i[None, :], j[:, None], b, p_ptr, p_st, e_ptr, padding_ptr,
            mask_ptr, mask_sb, mask_st, T, S, chunk, left_chunks, P, PADDING, MASK, CHUNKS,
        )  # fmt: skip
        w = tl.exp2((s - largest[None, :]) * LOG2E) * scale[None, :]
        g = load_rows(g_ptr, i, g_st, T, c, C)
        dv += product(w.to(g.dtype), g)
    offset = (b * H + h) * C
    if GATED:
        x_offset = b * x_sb + h * x_sh
        x = load_rows(x_ptr + x_offset, j, x_st, S, c, C).to(tl.float32)
        gate = tanh(load_rows(gate_ptr + x_offset, j, x_st, S, c, C).to(tl.float32))
        store_rows(dgate_ptr + offset, dv * x * (1.0 - gate * gate), j, B * H * C, S, c, C)
        dv *= gate
    store_rows(dv_ptr + offset, dv, j, B * H * C, S, c, C)


@triton.jit(do_not_specialize=VARYING)
def position_gradient_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, e_ptr, softmax_ptr,
    padding_ptr, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks,
    v_ptr, v_st, v_sb, v_sh, g_ptr, g_st, g_sb, g_sh, delta_ptr, penalty, limit, de_ptr,
    C, D: tl.constexpr, D_TILE: tl.constexpr, P: tl.constexpr, P_TILE: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """de[b, n] = sum_i ds[b, i, n - (T - 1) + i] p[b, i], for BN offsets n: sums along diagonals; (B, H, P, T + S - 1).

    For BN targets the diagonals lie within a tile of BN x 2 BN scores, whose rows are then shifted against each other.
    """
    offsets = T + S - 1
    block, b, h = split_program(tl.cdiv(offsets, BN), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += b * p_sb + h * p_sh
    v_ptr += b * v_sb + h * v_sh
    g_ptr += b * g_sb + h * g_sh
    e_ptr += h * P * offsets
    softmax_ptr += (h * B + b) * T * 2
    delta_ptr += (h * B + b) * T
    n0 = block * BN
    row = tl.arange(0, BN)
    column = tl.arange(0, 2 * BN)
    d = tl.arange(0, D_TILE)
    pd = tl.arange(0, P_TILE)
    diagonal = row[:, None] + row[None, :]
    de = tl.zeros([BN, P_TILE], tl.float32)
    # Targets whose sources n0 - (T - 1) + i .. + 2 BN - 2 meet [0, S).
    first = tl.maximum(T - 1 - n0 - 2 * BN + 2, 0) // BN * BN
    last = tl.minimum(S + T - 1 - n0, T)
    for i0 in range(first, last, BN):
        i = i0 + row
        j = n0 - (T - 1) + i0 + column
        q = load_rows(q_ptr, i, q_st, T, d, D)
        k = load_rows(k_ptr, j, k_st, S, d, D)
        largest, scale = load_largest(softmax_ptr, i, T), load_scale(softmax_ptr, i, T)
        raw, s, masked = complete_scores(
            product(q, tl.trans(k)), i[:, None], j[None, :], b, p_ptr, p_st, e_ptr, padding_ptr,
            mask_ptr, mask_sb, mask_st, T, S, chunk, left_chunks, P, PADDING, MASK, CHUNKS,
        )  # fmt: skip
        dw = row_products(g_ptr, i, g_st, T, v_ptr, j, v_st, S, C, BC, ONE_BLOCK)
        delta = tl.load(delta_ptr + i, mask=i < T, other=0.0)
        w = tl.exp2((s - largest[:, None]) * LOG2E) * scale[:, None]
        ds = score_gradient(w, raw, masked, dw, delta[:, None], penalty, limit)
        ds = tl.gather(ds, diagonal, 1)  # (BN targets, BN offsets)
        for m in tl.static_range(P):
            pm = tl.load(p_ptr + i.to(tl.int64) * p_st + m, mask=i < T, other=0.0).to(tl.float32)
            de += tl.where((pd == m)[None, :], tl.sum(ds * pm[:, None], 0)[:, None], 0.0)
    n = n0 + row
    de_ptr += (b * H + h) * P * offsets
    inside = (n < offsets)[:, None] & (pd < P)[None, :]
    tl.store(de_ptr + pd[None, :] * offsets + n[:, None], de, mask=inside)
