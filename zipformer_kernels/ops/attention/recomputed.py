"""Attention weights that every use computes again, from the scores and the softmax rows: memory is linear in T, S."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import store, stored_tensors
from zipformer_kernels.core.call import plain, without_autocast
from zipformer_kernels.ops.attention import reference
from zipformer_kernels.ops.attention.deferred import Piece, Tensors, Uses, differentiable_gradients, swap
from zipformer_kernels.ops.attention.launchers import AttentionLaunchers
from zipformer_kernels.ops.attention.scores import Masks, Scores, Use, by_heads, is_whole


class Recomputed(NamedTuple):
    """Reads weights of some heads from softmax rows, q, k, p, e and two masks.

    Attributes:
        heads: which.
        launchers: the backend's.
        rule: the chunks of `Masks`.
    """

    heads: slice
    launchers: AttentionLaunchers
    rule: tuple[int, int]

    def of_heads(self, heads: slice) -> Recomputed:
        return self._replace(heads=heads)

    def average(self, tensors: Tensors, values: Tensor) -> Tensor:
        return self.launchers.average_values(*self._of(tensors), values)

    def gated_average(self, tensors: Tensors, values: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        launch = self.launchers.gated_average
        return None if launch is None else launch(*self._of(tensors), values, y)

    def values_gradient(self, tensors: Tensors, grad: Tensor) -> Tensor:
        return self.launchers.values_gradient(*self._of(tensors), grad)

    def dense_average(self, tensors: Tensors, values: Tensor) -> Tensor:
        scores, softmax, masks = self._of(tensors)
        return reference.attention(*scores, values, softmax, *masks)

    def _of(self, tensors: Tensors) -> tuple[Scores, Tensor, Masks]:
        softmax, q, k, p, e, *masks = tensors
        scores, masks = Scores(q, k, p, e), Masks(*masks, *self.rule)
        if is_whole(self.heads, len(softmax)):
            return scores, softmax, masks
        return scores.of_heads(self.heads), softmax[self.heads], masks


class _Rows(torch.autograd.Function):
    """The softmax rows as made from q, k, p and e: the node whose backward serves all uses. They have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, launchers: AttentionLaunchers, uses: Uses, rule: tuple[int, int], *tensors: Tensor | None
    ) -> Tensor:
        ctx.launchers, ctx.uses, ctx.rule = launchers, uses, rule
        store(ctx, *tensors)
        ctx.set_materialize_grads(False)
        return torch.ops.aten.alias(tensors[0])

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        softmax, *tensors = saved = stored_tensors(ctx)
        scores, masks = Scores(*tensors[:4]), Masks(*tensors[4:], *ctx.rule)
        needs, penalty, left = ctx.needs_input_grad[4:8], ctx.uses.penalty, ctx.uses.take()
        if torch.is_grad_enabled():  # create_graph=True: uses have left nothing
            gradients = without_autocast(differentiable_gradients, needs, scores, masks, penalty, None)
        elif not left and penalty.weight == 0.0:
            gradients = [None] * 4
        else:
            factors = [x for use in left for x in use[1:]]
            launch = ctx.launchers.scores_gradients if plain(*saved, *factors) else _dense_gradients
            gradients = without_autocast(launch, needs, scores, softmax, masks, penalty, left)
        return None, None, None, None, *gradients, None, None


def _dense_gradients(
    needs: tuple[bool, ...], scores: Scores, softmax: Tensor, masks: Masks, penalty: tuple, uses: list[Use]
) -> tuple[Tensor | None, ...]:
    """As `AttentionLaunchers.scores_gradients`, by torch's operations, of tensors that kernels cannot read."""
    _, masked, _ = reference.masked_scores(scores, masks)
    w = reference.weights_from(masked, softmax)
    dw = torch.zeros_like(w)
    for heads, own in by_heads(len(w), uses):
        for values, _, grad in own:
            dw[heads] += (swap(grad) @ swap(values).transpose(2, 3)).to(dw.dtype)
    return reference.weights_backward(needs, (dw,), (w,), *scores, *masks, *penalty)[:4]


def make(launchers: AttentionLaunchers, scores: Scores, softmax: Tensor, masks: Masks) -> Piece:
    """The weights of all heads, from their softmax rows."""
    uses, rest = Uses(), (*scores, *masks[:2])
    rows = _Rows.apply(launchers, uses, masks[2:], softmax, *rest)
    return Piece(Recomputed(slice(0, len(softmax)), launchers, masks[2:]), (rows, *rest), scores.q.dtype, uses)
