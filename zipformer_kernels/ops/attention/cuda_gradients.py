"""The gradients of shared-weight attention on NVIDIA GPUs: ``csrc/attention/cuda_*.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.joint import empty_beside
from zipformer_kernels.core.launch import DTYPE_CODES, call_cuda, cdiv, multiprocessors, pointer
from zipformer_kernels.ops.attention import arguments
from zipformer_kernels.ops.attention.aligned import GROUP, aligned_scores, aligned_values, whole_groups
from zipformer_kernels.ops.attention.arguments import NO_ROWS, Arguments, projections, rows, unit_stride
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, Use, by_heads

STEP = 64
"""Targets that a block takes at once, and sources that it goes forward: `attention_step` of csrc."""

PACKED, PACKED_WIDE = 32, 128
"""Channels of all uses side by side are as many as the first number, or a multiple of as many as fill so many bytes."""

MOST_PARTS = tuning.entry("attention.cuda_parts")
"""Into so many the targets of a sequence and head are shared out at most: each part sums the gradient of the position
projections in memory of its own, 8 floats for each of T + S - 1 offsets."""

BLOCKS_PER_MULTIPROCESSOR = tuning.entry("attention.cuda_blocks")


def values_gradient(scores: Scores, softmax: Tensor, masks: Masks, grad: Tensor) -> Tensor:
    """W^T grad, (S, B, H, C): the gradient of the values of one use.

    Args:
        scores, masks: what W is made from.
        softmax: the softmax rows.
        grad: the gradient of the use's result, (T, B, H, C), of the dtype of q.
    """
    channels, grad = grad.shape[3], aligned_values(grad)
    dv = grad.new_empty(scores.k.shape[0], *grad.shape[1:])
    if grad.numel() > 0 and dv.numel() > 0:
        weights = Arguments(aligned_scores(scores), softmax, masks)  # holds copies until the call is over
        call_cuda("attention_values_gradient", grad, weights.struct(), rows(grad), rows(dv), grad.shape[3])
    else:
        dv.zero_()
    return dv[..., :channels].contiguous()


class _Packed(NamedTuple):
    """Values and gradients of uses side by side, (H, B, S or T, channels), and delta, (H, B, T)."""

    values: Tensor
    grads: Tensor
    delta: Tensor


def scores_gradients(
    needs: Sequence[bool], scores: Scores, softmax: Tensor, masks: Masks, penalty: Penalty, uses: Sequence[Use]
) -> list[Tensor | None]:
    """The gradients of q, k, p and e from all uses of the weights at once.

    Args:
        needs: which are wanted.
        scores, masks: what the weights are made from.
        softmax: the softmax rows.
        penalty: what the gradient of the scores gains, once.
        uses: of heads of `scores`.
    """
    filled = scores.q.numel() > 0 and scores.k.numel() > 0
    gradients = _room(scores, needs, filled)
    if not filled or all(x is None for x in gradients):
        return gradients
    given = aligned_scores(scores)
    written = [_writable(x, like) for x, like in zip(gradients[:3], given[:3], strict=True)]
    for heads, of_them in by_heads(scores.q.shape[2], uses):
        packed = _pack(scores.of_heads(heads), of_them)
        weights = Arguments(given.of_heads(heads), softmax[heads], masks)
        results = [None if x is None else x[:, :, heads] for x in written]
        de = None if gradients[3] is None else gradients[3][:, heads]
        _launch(weights, packed, penalty, results, de)
    for x, y in zip(gradients[:3], written, strict=True):
        if x is not y:
            x.copy_(y[..., : x.shape[3]])
    return gradients


def _room(scores: Scores, needs: Sequence[bool], filled: bool) -> list[Tensor | None]:
    """Gradients of the scores' tensors that are wanted, to be filled, or zeros."""
    if not filled:
        return [torch.zeros_like(x) if need and x is not None else None for x, need in zip(scores, needs, strict=True)]
    if all(needs[:3]) and scores.p is not None:
        gradients = empty_beside(*scores[:3])
    else:
        gradients = [
            torch.empty_like(x) if need and x is not None else None
            for x, need in zip(scores[:3], needs[:3], strict=True)
        ]
    return [*gradients, torch.empty_like(scores.e) if needs[3] and scores.e is not None else None]


def _writable(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """x if a kernel can write pairs of elements there, else room for the gradient of `like`, which has all channels."""
    if x is None or (
        x.shape == like.shape
        and x.stride(-1) == 1
        and x.data_ptr() % (2 * x.element_size()) == 0
        and all(stride % 2 == 0 for stride in x.stride()[:-1])
    ):
        return x
    return like.new_empty(like.shape)


def _pack(scores: Scores, uses: Sequence[tuple[Tensor, Tensor, Tensor]]) -> _Packed:
    """Values and gradients side by side, of uses that have all heads of the scores: values, result and gradient."""
    q, k = scores.q, scores.k
    (targets, batch, heads, _), sources = q.shape, k.shape[0]
    given = sum(values.shape[3] for values, *_ in uses)
    channels = PACKED if given <= PACKED else whole_groups(given, PACKED_WIDE // q.element_size())
    make = torch.empty if uses else torch.zeros
    options = {"device": q.device}
    packed = _Packed(
        make(heads, batch, sources, channels, dtype=q.dtype, **options),
        make(heads, batch, targets, channels, dtype=q.dtype, **options),
        make(heads, batch, targets, dtype=torch.float32, **options),
    )
    first = 0
    for use in uses:
        v, out, grad = (unit_stride(x.to(q.dtype)) for x in use)
        own, width = arguments.Use(rows(v), rows(out), rows(grad), v.shape[3]), v.shape[3]
        end = channels if use is uses[-1] else first + width
        sizes = targets, sources, batch, heads, first, end, channels
        call_cuda("attention_pack", q, own, *map(pointer, packed), *sizes, first > 0, DTYPE_CODES[q.dtype])
        first = end
    return packed


def _launch(
    weights: Arguments, packed: _Packed, penalty: Penalty, results: Sequence[Tensor | None], de: Tensor | None
) -> None:
    """Fills the gradients of some heads that are given room."""
    dq, dk, dp = results
    q, struct = weights.q, weights.struct()
    (targets, batch, heads, _), sources = q.shape, weights.k.shape[0]
    shared = struct, *map(pointer, packed), packed.values.shape[3]
    if dk is not None:
        call_cuda("attention_by_sources", q, *shared, NO_ROWS, rows(dk), NO_ROWS, 0, 1, 0, *penalty)
    if dq is None and dp is None and de is None:
        return
    blocks = cdiv(targets, STEP)
    wanted = cdiv(BLOCKS_PER_MULTIPROCESSOR.value * multiprocessors(q), batch * heads)
    parts = min(blocks, wanted, MOST_PARTS.value if de is not None else blocks)
    length = targets + whole_groups(sources, STEP) + STEP
    offsets = None
    if de is not None:
        offsets = torch.zeros(heads, batch * parts, length, 2 * GROUP, dtype=torch.float32, device=q.device)
    call_cuda(
        "attention_by_targets",
        q,
        *shared,
        *(rows(dq), NO_ROWS, rows(dp)),
        *(pointer(offsets), parts, length, *penalty),
    )
    if de is not None:
        sums = de if de.shape[2] == GROUP and de.stride(2) == 1 else de.new_empty(*de.shape[:2], GROUP)
        dtype = DTYPE_CODES[q.dtype]
        call_cuda(
            "attention_offsets",
            q,
            pointer(offsets),
            projections(sums),
            targets + sources - 1,
            heads,
            batch * parts,
            length,
            dtype,
        )
        if sums is not de:
            de.copy_(sums[..., : de.shape[2]])
