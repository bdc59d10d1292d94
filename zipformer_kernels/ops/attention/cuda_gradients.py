"""The gradients of shared-weight attention on NVIDIA GPUs: ``csrc/attention/cuda_*.cu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.joint import empty_beside
from zipformer_kernels.core.launch import DTYPE_CODES, call_cuda, cdiv, multiprocessors, pointer
from zipformer_kernels.ops.attention.aligned import GROUP, aligned_scores, aligned_values, cut
from zipformer_kernels.ops.attention.arguments import NO_ROWS, Arguments, projections, rows
from zipformer_kernels.ops.attention.cuda_uses import Together, bring_together
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, Use

STEP = 64
"""Targets that a block takes at once, and sources that it goes forward: `attention_step` of csrc."""

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
    return cut(dv, channels)


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
    weights = Arguments(given, softmax, masks)  # holds copies until the calls are over
    _launch(weights, bring_together(given, uses), penalty, written, gradients[3])
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


def _launch(
    weights: Arguments, uses: Together, penalty: Penalty, results: Sequence[Tensor | None], de: Tensor | None
) -> None:
    """Fills the gradients that are given room."""
    dq, dk, dp = (rows(x) for x in results)
    q, k, struct = weights.q, weights.k, weights.struct()
    (targets, batch, heads, _), sources, size = q.shape, k.shape[0], q.element_size()
    parts, share = _parts(q, min(len(own) for own, _ in uses.runs), de is not None)
    offsets = None
    if de is not None:
        length = STEP * (share + 1 + cdiv(sources, STEP))
        offsets = torch.empty(heads, batch, parts, length, 2 * GROUP, dtype=torch.float32, device=q.device)
    for own, channels in uses.runs:
        first, of_run = own.start, (struct.of_heads(own, size), channels)
        if dk.data:
            call_cuda(
                "attention_by_sources", q, *of_run, NO_ROWS, dk.from_head(first, size), NO_ROWS, 0, 1, 0, *penalty
            )
        if dq.data or dp.data or de is not None:
            memory = 0 if offsets is None else pointer(offsets) + first * offsets.stride(0) * 4
            call_cuda(
                "attention_by_targets",
                q,
                *of_run,
                *(dq.from_head(first, size), NO_ROWS, dp.from_head(first, size)),
                *(memory, parts, share, *penalty),
            )
    if de is not None:
        sums = de if de.shape[2] == GROUP and de.stride(2) == 1 else de.new_empty(*de.shape[:2], GROUP)
        sizes = targets, sources, batch, heads, parts, share
        call_cuda("attention_offsets", q, pointer(offsets), projections(sums), *sizes, DTYPE_CODES[q.dtype])
        if sums is not de:
            de.copy_(sums[..., : de.shape[2]])


def _parts(q: Tensor, heads: int, summing: bool) -> tuple[int, int]:
    """Into how many parts the targets of a sequence and head are shared out, and how many blocks of them one has.

    Args:
        q: the queries.
        heads: of the launch that has the fewest.
        summing: whether each part sums the gradient of the position projections.
    """
    blocks = cdiv(q.shape[0], STEP)
    wanted = cdiv(BLOCKS_PER_MULTIPROCESSOR.value * multiprocessors(q), q.shape[1] * heads)
    share = cdiv(blocks, min(wanted, MOST_PARTS.value if summing else blocks))
    return cdiv(blocks, share), share
