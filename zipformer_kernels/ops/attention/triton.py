"""Launchers of the Triton kernels of shared-weight attention; the kernels are in kernels.py and gradients.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zipformer_kernels.core.launch import GPU_DTYPES, cdiv, on_device, unsupported_dtype
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention import gradients, kernels
from zipformer_kernels.ops.attention.backward import Part, gradients_of_scores
from zipformer_kernels.ops.attention.launchers import AttentionLaunchers
from zipformer_kernels.ops.attention.layouts import Weights, unit_stride, weights_of
from zipformer_kernels.ops.attention.reference import empty_rows
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, Use, by_heads, grouped
from zipformer_kernels.ops.attention.tiles import tile_of


def softmax_rows(*args: Tensor | int | None) -> tuple[Tensor]:
    """The rows that make weights of scores, (H, B, T, 2); see reference.py."""
    scores, _, masks, _ = grouped(0, args)
    softmax = empty_rows(scores.q)
    if softmax.numel() > 0:
        _fill_rows(weights_of(scores, softmax, masks))
    return (softmax,)


def make_weights(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """W itself, (H, B, T, S), in the dtype of q; rows are padded with zeros to a multiple of 16 elements."""
    scores, _, masks, _ = grouped(0, args)
    q, k, *_ = scores
    targets, sequences, heads = q.shape[:3]
    width = cdiv(k.shape[0], 16) * 16
    w = q.new_empty(heads, sequences, targets, width)
    if w.numel() > 0:
        weights = weights_of(scores, empty_rows(q), masks)
        _fill_rows(weights)
        tile = weights.tile("weights")
        with on_device(q):
            kernels.weights_kernel[(weights.programs(targets, tile.targets),)](
                *(*weights.arguments(), w, width), **weights.constants(), **tile.blocks(), **tile.options()
            )
    return (w[..., : k.shape[0]],)


def average_values(scores: Scores, softmax: Tensor, masks: Masks, values: Tensor) -> Tensor:
    """W V, (T, B, H, C), contiguous, of values (S, B, H, C), with weights that are computed again."""
    return _average(scores, softmax, masks, values, None)[0]


def gated_average(scores: Scores, softmax: Tensor, masks: Masks, values: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """W V and, of the unrounded W V, the product (W V) y, both (T, B, H, C) and contiguous."""
    return _average(scores, softmax, masks, values, y)


def _average(scores: Scores, softmax: Tensor, masks: Masks, values: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    out = values.new_empty(scores.q.shape[0], *values.shape[1:])
    gated = out if y is None else torch.empty_like(out)
    if out.numel() > 0:
        weights, values = weights_of(scores, softmax, masks), unit_stride(values)
        gate = out if y is None else unit_stride(y)
        channels = values.shape[3]
        narrow = channels <= tile_of("aggregate", values.dtype).channels
        tile = weights.tile("aggregate" if narrow else "wide_aggregate")
        programs, shares = tile.shares(channels)
        with on_device(values):
            kernels.aggregate_kernel[(weights.programs(weights.targets, tile.targets), programs)](
                *(*weights.arguments(), values, *values.stride()[:3], out, channels, gate, *gate.stride()[:3], gated),
                **weights.constants(),
                **tile.blocks(),
                **shares,
                GATED=y is not None,
                **tile.options(),
            )
    return out, gated


def values_gradient(scores: Scores, softmax: Tensor, masks: Masks, grad: Tensor) -> Tensor:
    """W^T G, (S, B, H, C), contiguous, of the gradient G of the averages, with weights that are computed again."""
    dv = grad.new_empty(scores.k.shape[0], *grad.shape[1:])
    if grad.numel() == 0:
        return dv.zero_()
    if dv.numel() > 0:
        weights, grad = weights_of(scores, softmax, masks), unit_stride(grad)
        channels = grad.shape[3]
        by_pair = weights.masks.attn_mask is not None or masks.chunk > 0
        wide = channels > 16  # than one matrix instruction: some widths would spill in the larger tile
        tile = weights.tile("masked_value" if by_pair or wide else "value")
        programs, shares = tile.shares(channels)
        with on_device(grad):
            gradients.value_gradient_kernel[(weights.programs(weights.sources, tile.sources), programs)](
                *(*weights.arguments(), grad, *grad.stride()[:3], dv, channels),
                **weights.constants(),
                **tile.blocks(),
                **shares,
                **tile.options(),
            )
    return dv


def scores_gradients(
    needs: Sequence[bool], scores: Scores, softmax: Tensor, masks: Masks, penalty: Penalty, uses: Sequence[Use]
) -> list[Tensor | None]:
    """The gradients of q, k, p and e from all uses of the weights, which are computed again.

    Args:
        needs: which are wanted.
        scores, softmax, masks: what the weights are made from.
        penalty: on the scores.
        uses: what they have left; their heads are among those of the scores.
    """
    runs = by_heads(scores.q.shape[2], uses)
    parts = [Part(heads, softmax[heads], None, None, own) for heads, own in runs]
    return gradients_of_scores(needs, parts, scores, masks, penalty)


def weights_gradients(
    needs: Sequence[bool],
    pieces: Sequence[tuple[slice, Tensor, Tensor | None, Sequence[tuple[Tensor, Tensor, Tensor]]]],
    scores: Scores,
    masks: Masks,
    penalty: Penalty,
) -> list[Tensor | None]:
    """The gradients of q, k, p and e from those of pieces of W; arguments as of `cpu.weights_gradients`."""
    parts = [Part(heads, None, w, dw, uses) for heads, w, dw, uses in pieces]
    return gradients_of_scores(needs, parts, scores, masks, penalty)


def _fill_rows(weights: Weights) -> None:
    """Fills in the softmax rows."""
    tile = weights.tile("softmax" if weights.masks.attn_mask is None else "masked_softmax")
    with on_device(weights.q):
        kernels.softmax_kernel[(weights.programs(weights.targets, tile.targets),)](
            *weights.arguments(), **weights.constants(), **tile.blocks(), **tile.options()
        )


def _forward(*args):
    scores, (v, softmax), masks, _ = grouped(2, args)
    return (average_values(scores, softmax, masks, v),)


def _backward(needs, grads, saved, *args):
    scores, (v, softmax), masks, penalty = grouped(2, args)
    grad = grads[0].to(v.dtype)
    use = Use(slice(None), v, saved[0], grad)
    dscores = scores_gradients(needs[:4], scores, softmax, masks, penalty, [use])
    dv = values_gradient(scores, softmax, masks, grad) if needs[4] else None
    return *dscores, dv, None, None, None


def _weights_backward(needs, grads, saved, *args):
    scores, _, masks, penalty = grouped(0, args)
    pieces = [(slice(None), saved[0], grads[0], ())]
    return *weights_gradients(needs[:4], pieces, scores, masks, penalty), None, None


def unsupported(q: Tensor, k: Tensor, p: Tensor | None, e: Tensor | None, *rest: object) -> str | None:
    """Why the kernels cannot take these queries and keys, or None if they can."""
    if e is not None and e.ndim == 4:
        return "it takes one set of position projections for all sequences, got one for each"
    for x, name in ((q, "query"), (q if p is None else p, "position")):
        if x.shape[3] > 128:
            return f"it takes up to 128 {name} channels per head, got {x.shape[3]}"
    return unsupported_dtype(q, GPU_DTYPES)


launchers = AttentionLaunchers(
    unsupported,
    _forward,
    _backward,
    average_values=average_values,
    gated_average=gated_average,
    values_gradient=values_gradient,
    scores_gradients=scores_gradients,
    make_weights=make_weights,
    weights_gradients=weights_gradients,
    variants={
        "softmax": Launchers(unsupported, softmax_rows, None),
        "weights": Launchers(unsupported, lambda *args: (make_weights(*args)[0].contiguous(),), _weights_backward),
    },
)
