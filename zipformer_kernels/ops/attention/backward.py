"""Launches the Triton kernels for the gradients of q, k, p and e, from all uses of the weights at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.joint import empty_beside
from zipformer_kernels.core.launch import cdiv, next_power_of_2, on_device
from zipformer_kernels.ops.attention import gradients, kernels
from zipformer_kernels.ops.attention.layouts import Weights, strides_of, unit_stride, weights_of
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores
from zipformer_kernels.ops.attention.tiles import tile_of

SCRATCH_BYTES = tuning.entry("attention.triton_scratch_bytes")


class Part(NamedTuple):
    """Weights of some heads, and what their uses have left.

    Attributes:
        heads: which of the heads of the scores.
        softmax: their softmax rows, where weights are computed again.
        w: the weights, (H, B, T, S), where they are stored.
        dw: a gradient of W beside that of the uses, or None.
        uses: V (S, B, H, C), O and its gradient G, (T, B, H, C).
    """

    heads: slice
    softmax: Tensor | None
    w: Tensor | None
    dw: Tensor | None
    uses: Sequence[tuple[Tensor, Tensor, Tensor]]


class Packed(NamedTuple):
    """The uses' channels side by side.

    Attributes:
        values: (H, B, S, channels), zeros behind those of the uses; `channels` is a multiple of 16.
        grad: (H, B, T, channels).
        delta: (H, B, T), sum_c G O over all uses.
    """

    values: Tensor
    grad: Tensor
    delta: Tensor


def gradients_of_scores(
    needs: Sequence[bool], parts: Sequence[Part], scores: Scores, masks: Masks, penalty: Penalty
) -> list[Tensor | None]:
    """The gradients of q, k, p and e that are needed.

    Args:
        needs: which are.
        parts: weights by head.
        scores, masks, penalty: of all heads.
    """
    q, k, p, e = scores
    if q.numel() == 0 or k.numel() == 0 or not any(needs):
        return [torch.zeros_like(x) if need and x is not None else None for x, need in zip(scores, needs, strict=True)]
    found = empty_beside(*(x for x in (q, k, p) if x is not None))
    dq, dk, dp = (*map(unit_stride, found), None)[:3]
    sequences, heads = q.shape[1:3]
    de = None if p is None or not needs[3] else e.new_empty(sequences, heads, *e.shape[::2], dtype=torch.float32)
    for part in parts:
        of_part = Scores(*(None if x is None else x[:, :, part.heads] for x in (dq, dk, dp)), None)
        own = None if de is None else de[:, part.heads]
        _of_part(needs, part, weights_of(scores.of_heads(part.heads), part.softmax, masks), penalty, of_part, own)
    if de is not None:
        de = de.sum(0).transpose(0, 1).to(e.dtype)
    return [x if need else None for x, need in zip((dq, dk, dp, de), needs, strict=True)]


def _of_part(
    needs: Sequence[bool], part: Part, weights: Weights, penalty: Penalty, written: Scores, de: Tensor | None
) -> None:
    """Fills in the gradients of one part, a block of targets at a time."""
    q, p = weights.q, weights.p
    tile, keys, positions = weights.tile("score"), tile_of("key", q.dtype), tile_of("position", q.dtype)
    step = max(tile.targets, keys.targets, positions.targets)
    margin = next_power_of_2(max(positions.targets + positions.sources, keys.sources))
    width = margin + cdiv(weights.sources, tile.sources) * tile.sources
    planes = weights.heads * weights.sequences
    limit = SCRATCH_BYTES.value // (planes * width * q.element_size())
    block = min(cdiv(weights.targets, step), max(1, limit // step)) * step
    several = block < weights.targets
    ds = q.new_empty(planes * block * width + margin)
    dk = torch.zeros_like(written.k, dtype=torch.float32) if several else written.k
    stored, dense = _padded(part.w, q.dtype), _padded(part.dw, q.dtype)
    packed = pack(part.uses, stored, dense, weights)
    sizes = weights.targets, weights.sources, weights.sequences, weights.heads
    of_queries = {name: size for name, size in weights.constants().items() if name in ("D", "D_TILE")}
    dp = written.q if written.p is None else written.p
    channels = packed.values.shape[3]
    with on_device(q):
        for first in range(0, weights.targets, block):
            w, dw = (q if x is None else x[:, :, first : first + block] for x in (stored, dense))
            gradients.score_gradient_kernel[(weights.programs(block, tile.targets),)](
                *(*weights.arguments(), w, w.stride(2), dw),
                *(packed.grad, packed.values, channels, packed.delta, *penalty),
                *(ds, width, first // 16, block, written.q, *written.q.stride()[:3], dp, *dp.stride()[:3], dp.shape[3]),
                **weights.constants(),
                **tile.blocks(),
                BC=min(next_power_of_2(channels), tile.channels),
                ONE_BLOCK=channels <= tile.channels,
                MARGIN=margin,
                STORED=stored is not None,
                DENSE=dense is not None,
                **tile.options(),
            )
            block_of_targets = ds, width, *sizes, first // 16, block
            if needs[1]:
                gradients.key_gradient_kernel[(weights.programs(weights.sources, keys.sources),)](
                    *(q, *q.stride()[:3], *block_of_targets, int(several), dk, *dk.stride()[:3]),
                    **of_queries,
                    MARGIN=margin,
                    **keys.blocks(),
                    **keys.options(),
                )
            if p is not None:
                _add_positions(needs, weights, block_of_targets, margin, written.p, de)
    if several:
        written.k.copy_(dk)


def _add_positions(
    needs: Sequence[bool], weights: Weights, block_of_targets: tuple, margin: int, dp: Tensor, de: Tensor
) -> None:
    """Fills in the gradient of p of a block of targets, and adds what it contributes to that of e."""
    p, table, tile = weights.p, weights.table, tile_of("position", weights.q.dtype)
    targets = block_of_targets[-1]
    constants = {
        "P": dp.shape[3],
        "P_COLUMNS": max(16, table.tile),
        "MARGIN": margin,
        **tile.blocks(),
        **tile.options(),
    }
    if needs[2] and table.term != kernels.BY_SLOTS.value:
        gradients.position_query_gradient_kernel[(weights.programs(targets, tile.targets),)](
            *(table.data, *block_of_targets, table.lead, table.copy, dp, *dp.stride()[:3]),
            P_TILE=table.tile,
            TERM=table.term,
            **constants,
        )
    if needs[3]:
        several = targets < weights.targets  # blocks: none of them has all offsets
        if several and block_of_targets[-2] == 0:
            de.zero_()
        gradients.position_gradient_kernel[(weights.programs(weights.sources + targets - 1, tile.sources),)](
            *(p, *strides_of(p), *block_of_targets, int(several), de, *de.stride()[:2]), **constants
        )


def pack(
    uses: Sequence[tuple[Tensor, Tensor, Tensor]], w: Tensor | None, dw: Tensor | None, weights: Weights
) -> Packed:
    """The uses' channels side by side, and delta; `w` and `dw`, if given, with rows that are padded."""
    planes = weights.heads, weights.sequences
    uses = [[unit_stride(x) for x in use] for use in uses]
    dtype = reduce(torch.promote_types, (x.dtype for use in uses for x in use), weights.q.dtype)
    width = max(16, cdiv(sum(use[0].shape[3] for use in uses), 16) * 16)
    empty = torch.empty if uses else torch.zeros
    values, grad = (
        empty(*planes, rows, width, dtype=dtype, device=weights.q.device) for rows in (weights.sources, weights.targets)
    )
    make = torch.zeros if dw is None and not uses else torch.empty
    packed = Packed(values, grad, make(*planes, weights.targets, dtype=torch.float32, device=weights.q.device))
    at = 0
    for number, use in enumerate(uses):
        channels = use[0].shape[3]
        wide = width - at if number == len(uses) - 1 else channels
        _pack(use, packed, at, wide, number == 0)
        at += channels
    if dw is not None:
        w, dw = (x.permute(2, 1, 0, 3) for x in (w, dw))
        _pack((None, w, dw), packed, 0, dw.shape[3], not uses)
    return packed


def _pack(use: Sequence[Tensor | None], packed: Packed, at: int, wide: int, first: bool) -> None:
    """Packs V, and of O and G, at a channel, so many; or adds to delta alone where there is no V."""
    v, out, g = use
    targets, sequences, heads, channels = g.shape
    sources, tile = 0 if v is None else v.shape[0], tile_of("pack", g.dtype)
    programs = (cdiv(targets, tile.targets) + cdiv(sources, tile.targets)) * sequences * heads
    values = g if v is None else v
    with on_device(g):
        gradients.pack_kernel[(programs,)](
            *(values, *values.stride()[:3], g, *g.stride()[:3], out, *out.stride()[:3]),
            *(packed.values[..., at:], packed.grad[..., at:], packed.grad.stride(2), packed.delta),
            *(targets, sources, sequences, heads, channels, wide, int(first)),
            BM=tile.targets,
            BC=tile.block(wide),
            PACK=v is not None,
            **tile.options(),
        )


def _padded(w: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Weights (H, B, T, S) in rows of a multiple of 16 elements, as `make_weights` has them."""
    if w is None:
        return None
    _, sequences, targets, sources = w.shape
    width = cdiv(sources, 16) * 16
    if w.dtype == dtype and w.stride() == (sequences * targets * width, targets * width, width, 1):
        return w
    return F.pad(w.to(dtype), (0, width - sources))
