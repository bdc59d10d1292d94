"""Triton kernels of shared-weight attention, forward; those of backward stand in gradients.py.

A program has BM targets of one sequence and head and walks over sources, BN at a time, or the other way round. Scores
are made a tile at a time, from q, k, p and e, and turned into weights by two numbers that are saved for each target.
Products of float32 are not rounded to TF32.

The term p_i . e[T - 1 - i + j] is a matrix product too. For 16 targets i0 + r and BN sources j0 + m let::

    A[r, P s + d] = p[i0 + r, d] where s = 15 - r, else 0            (16, 16 P)
    B[P s + d, m] = e[T - 16 - i0 + j0 + m + s, d]                   (16 P, BN)

Then (A B)[r, m] is the term. B is read from a table of e whose rows lie one after the other, so that B[k, m] is element
k of the row of m and those behind it: wide loads, and none of them masked, for there are zeros around. See `TERMS` for
what does otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zipformer_kernels.core.jit import jit

LOG2E = tl.constexpr(1.4426950408889634)
MASKED_SCORE = tl.constexpr(-1000.0)

NO_TERM = tl.constexpr(0)
BY_SLOTS = tl.constexpr(1)
BY_LOADS = tl.constexpr(2)
BY_GATHER = tl.constexpr(3)
"""How the positional term is computed. By slots: the product above, for elements of 2 bytes and up to 8 channels. By
loads: a load for each score and channel, for float32, whose products have no matrix instruction, with up to 8 channels.
By gather: a product with the BM + BN rows of e that a tile meets, whose rows are then shifted against each other."""

VARYING = [
    "T",
    "S",
    "B",
    "chunk",
    "left_chunks",
    "mask_sb",
    "mask_st",
    "p_st",
    "p_sb",
    "p_sh",
    "padding_sb",
    "padding_sj",
    "lead",
    "copy",
]
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
def load_positions(p_ptr, p_st, i0, T, P_TILE: tl.constexpr, BM: tl.constexpr, TERM: tl.constexpr):
    """p of targets i0 .. i0 + BM: by slots A above, (BM / 16, 16, 16 P_TILE), else (BM, P_TILE)."""
    if TERM == BY_SLOTS:
        r = tl.arange(0, 16)[None, :, None]
        i = i0 + 16 * tl.arange(0, BM // 16)[:, None, None] + r
        k = tl.arange(0, 16 * P_TILE)[None, None, :]
        own = (k // P_TILE == 15 - r) & (i < T)
        return tl.load(p_ptr + (i.to(tl.int64) * p_st * 4 + k % P_TILE), mask=own, other=0.0)
    else:
        return load_rows(p_ptr, i0 + tl.arange(0, BM), p_st * 4, T, tl.arange(0, P_TILE), P_TILE)


@triton.jit
def load_window(table_ptr, i0, j0, lead, copy, P_TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """B above, for every 16 of the targets: (BM / 16, 16 P_TILE, BN). Arguments as of `add_term`.

    All that differs within a tile is 64-bit and stands apart, for then it ends up within the loads themselves.
    """
    COPIES: tl.constexpr = 8 // P_TILE
    SUBTILES: tl.constexpr = BM // 16
    first = P_TILE * (lead * 16 - BM - i0 + j0)
    m = tl.arange(0, BN)[None, None, :]
    k = tl.arange(0, 16 * P_TILE)[None, :, None]
    r = SUBTILES - 1 - tl.arange(0, SUBTILES)[:, None, None]
    within = (16 * P_TILE * r + m // COPIES * 8 + k).to(tl.int64) + (m % COPIES).to(tl.int64) * (copy * 16)
    return tl.load(table_ptr + first + within)


@triton.jit
def add_term(
    s, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T,
    P_TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TERM: tl.constexpr,
):  # fmt: skip
    """Adds the positional term to a tile (BM, BN) of scores.

    Args:
        p: of `load_positions`.
        table_ptr: of the head: the row of offset n is 16 lead - T + n. By slots with four channels there are two such
            tables, 16 copy elements apart, the second without its first row: so rows lie at multiples of 16 bytes in
            one of the two. (The compiler sees the factor 16, as it does not see what is said of an argument.)
        i0, j0: the first target and source, multiples of 16.
    """
    if TERM == BY_SLOTS:
        s += tl.reshape(product(p, load_window(table_ptr, i0, j0, lead, copy, P_TILE, BM, BN)), [BM, BN])
    lead = lead * 16
    if TERM == BY_LOADS:
        i = i0 + tl.arange(0, BM)
        row = lead - 1 - i[:, None] + j0 + tl.arange(0, BN)[None, :]
        for d in tl.static_range(P_TILE):
            pd = tl.load(p_ptr + i.to(tl.int64) * p_st * 4 + d, mask=i < T, other=0.0)
            s += pd.to(tl.float32)[:, None] * tl.load(table_ptr + (row * P_TILE + d)).to(tl.float32)
    if TERM == BY_GATHER:
        WINDOW: tl.constexpr = 2 * (BM if BM > BN else BN)
        row = lead - BM - i0 + j0 + tl.arange(0, WINDOW)
        e = tl.load(table_ptr + (row[:, None] * P_TILE + tl.arange(0, P_TILE)[None, :]))
        column = BM - 1 - tl.arange(0, BM)[:, None] + tl.arange(0, BN)[None, :]
        s += tl.gather(product(p, tl.trans(e)), column, 1)
    return s


@triton.jit
def table_of(table_ptr, h, copy, P_TILE: tl.constexpr, TERM: tl.constexpr):
    """The table of a head, for `add_term`."""
    return table_ptr + h * (8 // P_TILE if TERM == BY_SLOTS else 1) * copy * 16


@triton.jit
def score_tile(
    q, k, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T,
    P_TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TERM: tl.constexpr,
):  # fmt: skip
    """Scores (BM, BN) before masking, of tiles of q, k and p."""
    s = product(q, tl.trans(k))
    return add_term(s, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T, P_TILE, BM, BN, TERM)


@triton.jit
def load_filling(padding_ptr, padding_sj, j, S, PADDING: tl.constexpr):
    """What stands for the scores of sources j (BN,): -inf beyond the sources, -1000 for padding, 0: themselves."""
    filling = tl.where(j < S, 0.0, float("-inf"))
    if PADDING:
        padded = tl.load(padding_ptr + j.to(tl.int64) * padding_sj, mask=j < S, other=0) != 0
        filling = tl.where(padded, MASKED_SCORE, filling)
    return filling


@triton.jit
def fill_masked(
    s, i, j, filling, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Scores of targets i (BM,) and sources j (BN,), -1000 where a pair is masked and -inf beyond the sources.

    `filling` is that of the sources; `mask_ptr` is that of the sequence.
    """
    s = fill_rules(s, MASKED_SCORE, i, j, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK, CHUNKS)
    return tl.where((filling == 0.0)[None, :], s, filling[None, :])


@triton.jit
def fill_rules(x, value, i, j, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK: tl.constexpr, CHUNKS: tl.constexpr):
    """x with `value` where the mask for pairs or the rule of chunks forbid a pair."""
    if MASK:
        inside = (i < T)[:, None] & (j < S)[None, :]
        rows = mask_ptr + i.to(tl.int64)[:, None] * mask_st
        x = tl.where(tl.load(rows + j[None, :], mask=inside, other=0) != 0, value, x)
    if CHUNKS:
        own = i // chunk
        first, last = tl.maximum(own - left_chunks, 0) * chunk, (own + 1) * chunk
        x = tl.where((j[None, :] < first[:, None]) | (j[None, :] >= last[:, None]), value, x)
    return x


@triton.jit
def load_largest(softmax_ptr, i, T):
    """The largest score of targets i."""
    return tl.load(softmax_ptr + 2 * i, mask=i < T, other=0.0)


@triton.jit
def load_scale(softmax_ptr, i, T):
    """The scale of targets i: weights are exp(s - largest) scale."""
    return tl.load(softmax_ptr + 2 * i + 1, mask=i < T, other=1.0)


@triton.jit
def exponential(s, largest, ROUGHLY: tl.constexpr):
    """exp(s - largest) of a tile and its targets' largest scores.

    Roughly, for results of 2 bytes: in one multiplication and addition, which rounds largest log2(e).
    """
    if ROUGHLY:
        return tl.exp2(s * LOG2E - (largest * LOG2E)[:, None])
    else:
        return tl.exp2((s - largest[:, None]) * LOG2E)


@triton.jit
def make_weights(s, largest, scale, ROUGHLY: tl.constexpr):
    """exp(s - largest) scale; roughly, for results of 2 bytes, with the scale in the exponent."""
    if ROUGHLY:
        return tl.exp2(s * LOG2E - (largest * LOG2E - tl.log2(scale))[:, None])
    else:
        return tl.exp2((s - largest[:, None]) * LOG2E) * scale[:, None]


@jit(do_not_specialize=["offsets", "rows", "front"])
def spread_kernel(
    e_ptr, e_sn, e_sh, e_sp, table_ptr, offsets, rows, front,
    P: tl.constexpr, P_TILE: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The table (H, COPIES, rows, P_TILE) of `add_term`: row `front` + n - c of copy c is e[n], and all else zero."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, P_TILE)
    for c in tl.static_range(COPIES):
        n = row - front + c
        inside = ((n >= 0) & (n < offsets))[:, None] & (d < P)[None, :]
        e = tl.load(e_ptr + h * e_sh + n.to(tl.int64)[:, None] * e_sn + d[None, :] * e_sp, mask=inside, other=0.0)
        table = table_ptr + (h * COPIES + c) * rows * P_TILE
        tl.store(table + row[:, None] * P_TILE + d[None, :], e, mask=(row < rows)[:, None])


@jit(do_not_specialize=[*VARYING, "H"])  # of all heads, and of one where weights are constant
def softmax_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, table_ptr, softmax_ptr,
    padding_ptr, padding_sb, padding_sj, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks, lead, copy,
    D: tl.constexpr, D_TILE: tl.constexpr, P_TILE: tl.constexpr, TERM: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The largest score of each target and 1 / sum_j exp(s - largest), online over the sources: (H, B, T, 2)."""
    block, b, h = split_program(tl.cdiv(T, BM), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += (b * p_sb + h * p_sh) * 4
    table_ptr = table_of(table_ptr, h, copy, P_TILE, TERM)
    padding_ptr += b * padding_sb
    mask_ptr += b * mask_sb
    ROUGHLY: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    d = tl.arange(0, D_TILE)
    q = load_rows(q_ptr, i, q_st, T, d, D)
    p = load_positions(p_ptr, p_st, i0, T, P_TILE, BM, TERM)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for j0 in range(0, S, BN):
        j = j0 + tl.arange(0, BN)
        k = load_rows(k_ptr, j, k_st, S, d, D)
        s = score_tile(q, k, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T, P_TILE, BM, BN, TERM)
        filling = load_filling(padding_ptr, padding_sj, j, S, PADDING)
        s = fill_masked(s, i, j, filling, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK, CHUNKS)
        new = tl.maximum(largest, tl.max(s, 1))  # finite: the first tile has a source
        total = total * tl.exp2((largest - new) * LOG2E) + tl.sum(exponential(s, new, ROUGHLY), 1)
        largest = new
    softmax_ptr += (h * B + b) * T * 2
    tl.store(softmax_ptr + 2 * i, largest, mask=i < T)
    tl.store(softmax_ptr + 2 * i + 1, 1.0 / tl.where(total == 0.0, 1.0, total), mask=i < T)


@jit(do_not_specialize=[*VARYING, "H"])
def weights_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, table_ptr, softmax_ptr,
    padding_ptr, padding_sb, padding_sj, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks, lead, copy,
    w_ptr, w_st,
    D: tl.constexpr, D_TILE: tl.constexpr, P_TILE: tl.constexpr, TERM: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """W itself, (H, B, T, w_st), with zeros beyond the sources; w_st is a multiple of 16."""
    block, b, h = split_program(tl.cdiv(T, BM), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += (b * p_sb + h * p_sh) * 4
    table_ptr = table_of(table_ptr, h, copy, P_TILE, TERM)
    padding_ptr += b * padding_sb
    mask_ptr += b * mask_sb
    softmax_ptr += (h * B + b) * T * 2
    w_st = tl.multiple_of(w_st, 16)
    ROUGHLY: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    d = tl.arange(0, D_TILE)
    q = load_rows(q_ptr, i, q_st, T, d, D)
    p = load_positions(p_ptr, p_st, i0, T, P_TILE, BM, TERM)
    largest, scale = load_largest(softmax_ptr, i, T), load_scale(softmax_ptr, i, T)
    w_ptr += ((h * B + b) * T + i0) * w_st
    for j0 in range(0, w_st, BN):
        j = j0 + tl.arange(0, BN)
        k = load_rows(k_ptr, j, k_st, S, d, D)
        s = score_tile(q, k, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T, P_TILE, BM, BN, TERM)
        filling = load_filling(padding_ptr, padding_sj, j, S, PADDING)
        s = fill_masked(s, i, j, filling, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK, CHUNKS)
        w = make_weights(s, largest, scale, ROUGHLY).to(w_ptr.dtype.element_ty)
        own = (i < T)[:, None] & (j < w_st)[None, :]
        tl.store(w_ptr + (tl.arange(0, BM)[:, None] * w_st + j[None, :]), w, mask=own)


@jit(do_not_specialize=VARYING)
def aggregate_kernel(
    q_ptr, q_st, q_sb, q_sh, k_ptr, k_st, k_sb, k_sh, p_ptr, p_st, p_sb, p_sh, table_ptr, softmax_ptr,
    padding_ptr, padding_sb, padding_sj, mask_ptr, mask_sb, mask_st, T, S, B, H, chunk, left_chunks, lead, copy,
    v_ptr, v_st, v_sb, v_sh, out_ptr, C, y_ptr, y_st, y_sb, y_sh, gated_ptr,
    D: tl.constexpr, D_TILE: tl.constexpr, P_TILE: tl.constexpr, TERM: tl.constexpr,
    PADDING: tl.constexpr, MASK: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, REST: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """out[i] = sum_j w[i, j] v[j], contiguous, for one block of BC + REST channels: powers of two, or no REST.

    Where GATED also out y, of the unrounded sum.
    """
    block, b, h = split_program(tl.cdiv(T, BM), B, H)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + h * k_sh
    p_ptr += (b * p_sb + h * p_sh) * 4
    v_ptr += b * v_sb + h * v_sh
    table_ptr = table_of(table_ptr, h, copy, P_TILE, TERM)
    padding_ptr += b * padding_sb
    mask_ptr += b * mask_sb
    softmax_ptr += (h * B + b) * T * 2
    ROUGHLY: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    d = tl.arange(0, D_TILE)
    c = tl.program_id(1) * (BC + REST) + tl.arange(0, BC)
    rest = tl.program_id(1) * (BC + REST) + BC + tl.arange(0, max(REST, 1))
    q = load_rows(q_ptr, i, q_st, T, d, D)
    p = load_positions(p_ptr, p_st, i0, T, P_TILE, BM, TERM)
    largest = load_largest(softmax_ptr, i, T)
    sums = tl.zeros([BM, BC], tl.float32)
    more = tl.zeros([BM, max(REST, 1)], tl.float32)
    for j0 in range(0, S, BN):
        j = j0 + tl.arange(0, BN)
        k = load_rows(k_ptr, j, k_st, S, d, D)
        s = score_tile(q, k, p, p_ptr, p_st, table_ptr, i0, j0, lead, copy, T, P_TILE, BM, BN, TERM)
        filling = load_filling(padding_ptr, padding_sj, j, S, PADDING)
        s = fill_masked(s, i, j, filling, mask_ptr, mask_st, T, S, chunk, left_chunks, MASK, CHUNKS)
        w = exponential(s, largest, ROUGHLY).to(v_ptr.dtype.element_ty)
        sums += product(w, load_rows(v_ptr, j, v_st, S, c, C))
        if REST:
            more += product(w, load_rows(v_ptr, j, v_st, S, rest, C))
    scale = load_scale(softmax_ptr, i, T)[:, None]
    out_ptr += (b * H + h) * C
    store_rows(out_ptr, sums * scale, i, B * H * C, T, c, C)
    if REST:
        store_rows(out_ptr, more * scale, i, B * H * C, T, rest, C)
    if GATED:
        gated_ptr += (b * H + h) * C
        y_ptr += b * y_sb + h * y_sh
        y = load_rows(y_ptr, i, y_st, T, c, C).to(tl.float32)
        store_rows(gated_ptr, sums * scale * y, i, B * H * C, T, c, C)
        if REST:
            y = load_rows(y_ptr, i, y_st, T, rest, C).to(tl.float32)
            store_rows(gated_ptr, more * scale * y, i, B * H * C, T, rest, C)
