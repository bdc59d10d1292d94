"""Attention weights that are stored whole, (H, B, T, S): averages and values' gradients are products of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import store, stored_tensors
from zipformer_kernels.core.call import plain, without_autocast
from zipformer_kernels.ops.attention import reference
from zipformer_kernels.ops.attention.deferred import Piece, Tensors, Uses, differentiable_gradients, swap
from zipformer_kernels.ops.attention.launchers import AttentionLaunchers
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, Use, by_heads, grouped


class Stored(NamedTuple):
    """Reads weights of some heads from the one tensor that they are stored in."""

    heads: slice

    def of_heads(self, heads: slice) -> Stored:
        return Stored(heads)

    def average(self, tensors: Tensors, values: Tensor) -> Tensor:
        return swap(tensors[0][self.heads] @ swap(values))

    def gated_average(self, tensors: Tensors, values: Tensor, y: Tensor) -> None:
        return None  # W V is a product of torch

    def values_gradient(self, tensors: Tensors, grad: Tensor) -> Tensor:
        return swap(tensors[0][self.heads].transpose(2, 3) @ swap(grad))

    dense_average = average


class _Make(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, launchers: AttentionLaunchers, uses: Sequence[Uses], groups: Sequence[slice], *args: Any
    ) -> tuple[Tensor, ...]:
        scores, _, masks, ctx.penalty = grouped(0, args)
        rest = *masks, *ctx.penalty
        weights = [without_autocast(launchers.make_weights, *scores.of_heads(heads), *rest)[0] for heads in groups]
        ctx.launchers, ctx.uses, ctx.groups, ctx.rule = launchers, uses, groups, masks[2:]
        store(ctx, *scores, *masks[:2], *weights)
        ctx.set_materialize_grads(False)
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *dweights: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = stored_tensors(ctx)  # once: checkpointing computes them again
        scores, masks, weights = Scores(*saved[:4]), Masks(*saved[4:6], *ctx.rule), saved[6:]
        needs = ctx.needs_input_grad[3:7]
        left = [uses.take() for uses in ctx.uses]
        pieces = list(zip(ctx.groups, weights, dweights, left, strict=True))
        if torch.is_grad_enabled():  # create_graph=True: uses have left nothing
            given = any(dw is not None for dw in dweights)
            dw = torch.cat([_gradient(*piece[1:]) for piece in pieces]) if given else None
            gradients = without_autocast(differentiable_gradients, needs, scores, masks, ctx.penalty, dw)
        elif plain(*saved, *dweights):
            runs = [run for piece in pieces for run in _runs(*piece)]
            gradients = without_autocast(ctx.launchers.weights_gradients, needs, runs, scores, masks, ctx.penalty)
        else:
            dw = torch.cat([_gradient(*piece[1:]) for piece in pieces])
            args = *scores, *masks, *ctx.penalty
            gradients = reference.weights_backward(needs, (dw,), (torch.cat(weights),), *args)[:4]
        return None, None, None, *gradients, *(None,) * (len(masks) + len(ctx.penalty))


def _runs(
    group: slice, w: Tensor, dw: Tensor | None, left: Sequence[Use]
) -> list[tuple[slice, Tensor, Tensor | None, list]]:
    """A piece of W cut into heads with the same uses, as `AttentionLaunchers.weights_gradients` takes them."""
    first, runs = group.start, by_heads(len(w), left)
    return [
        (slice(first + own.start, first + own.stop), w[own], None if dw is None else dw[own], uses)
        for own, uses in runs
    ]


def _gradient(w: Tensor, dw: Tensor | None, left: Sequence[Use]) -> Tensor:
    """The gradient of a piece of W, as large as itself."""
    dw = torch.zeros_like(w) if dw is None else dw
    for heads, uses in by_heads(len(w), left) if left else ():
        for values, _, grad in uses:
            dw = dw.index_add(0, _index(heads, w), swap(grad) @ swap(values).transpose(2, 3))
    return dw


def _index(heads: slice, like: Tensor) -> Tensor:
    return torch.arange(heads.start, heads.stop, device=like.device)


def make(
    launchers: AttentionLaunchers, groups: Sequence[slice], scores: Scores, masks: Masks, penalty: Penalty
) -> tuple[Piece, ...]:
    """The weights in pieces of some heads each; `groups` have both ends."""
    uses = [Uses() for _ in groups]
    weights = _Make.apply(launchers, uses, groups, *scores, *masks, *penalty)
    return tuple(map(given, weights, uses))


def given(w: Tensor, uses: Uses | None = None) -> Piece:
    """The weights in a tensor."""
    return Piece(Stored(slice(0, len(w))), (w,), w.dtype, uses)


def tensor(piece: Piece) -> Tensor:
    """The weights of a piece of stored weights, (heads, B, T, S)."""
    (w,) = piece.tensors
    return w if len(piece) == len(w) else w[piece.reader.heads]


def dense_average(weights: Sequence[Tensor], values: Tensor) -> Tensor:
    """W V, (T, B, H, C), by torch's operations, of weights in pieces by head."""
    averages, first = [], 0
    for w in weights:
        averages.append(swap(w @ swap(values[:, :, first : first + len(w)])))
        first += len(w)
    return averages[0] if len(averages) == 1 else torch.cat(averages, dim=2)
