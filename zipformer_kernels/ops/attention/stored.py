"""Attention weights that are stored, and what their uses leave of the scores' gradient.

With use u averaging values V_u to O_u = W V_u, and G_u the gradient of O_u::

    dV_u = W^T G_u,   ds = W * (sum_u G_u V_u^T - D),   D = sum_u rowsum(G_u * O_u)

The gradient of W, as large as W, is never made: backward of a use gives dV_u and leaves V_u, O_u and G_u to backward of
the weights, which one kernel takes all gradients of scores from, a tile at a time. What a use leaves is stored apart
for each backward pass over a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import reference_gradients, store, stored_tensors
from zipformer_kernels.core.call import autocast_dtype, plain, without_autocast
from zipformer_kernels.core.private import backward_pass, knows_backward_passes, will_execute
from zipformer_kernels.ops.attention import cpu, reference
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, grouped

Use = tuple[Tensor, Tensor, Tensor]  # V_u, O_u, G_u: (frames, B, H, C)


@dataclass(frozen=True)
class Piece:
    """Weights of some heads, (H, B, T, S), and where their uses leave what `make` wants; None for a tensor alone."""

    w: Tensor
    uses: Uses | None = None

    def __len__(self) -> int:
        return len(self.w)

    def serves(self, values: Tensor) -> bool:
        """Whether a use of the values leaves its part, rather than to multiply with the tensor."""
        same = self.w.dtype == values.dtype and autocast_dtype(values) in (None, values.dtype)
        leaves = self.uses is not None and knows_backward_passes
        return same and leaves and torch.is_grad_enabled() and plain(values)


@dataclass
class Uses:
    """What the uses of one piece have left, by backward pass."""

    left: dict[int, list[Use]] = field(default_factory=dict)

    def leave(self, weights: Any, *use: Tensor) -> None:
        """Leaves V_u, O_u and G_u to the pass that is going on, unless that will not come to the weights.

        Args:
            weights: the node of the graph that made them, as ``ctx.next_functions`` has it; None if they need nothing.
            use: V_u, O_u and G_u.
        """
        if weights is not None and will_execute(weights):
            self.left.setdefault(backward_pass(), []).append(use)

    def take(self) -> list[Use]:
        """All that was left in the pass that is going on."""
        return self.left.pop(backward_pass(), [])


class _Make(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uses: Sequence[Uses], groups: Sequence[slice], *args: Any) -> tuple[Tensor, ...]:
        scores, _, masks, ctx.penalty = grouped(0, args)
        weights = [cpu.make_weights(*scores.of_heads(heads), *masks, *ctx.penalty)[0] for heads in groups]
        ctx.uses, ctx.groups, ctx.rule = uses, groups, masks[2:]
        store(ctx, *scores, *masks[:2], *weights)
        ctx.set_materialize_grads(False)
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *dweights: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = stored_tensors(ctx)  # once: checkpointing computes them again
        scores, masks, weights = Scores(*saved[:4]), Masks(*saved[4:6], *ctx.rule), saved[6:]
        needs = ctx.needs_input_grad[2:6]
        left = [uses.take() for uses in ctx.uses]
        if torch.is_grad_enabled():  # create_graph=True: uses have left nothing
            wanted = [x for x, need in zip(scores, needs, strict=True) if need]
            w = reference.weights(*scores, *masks, *ctx.penalty)
            made = [w[heads] for heads, dw in zip(ctx.groups, dweights, strict=True) if dw is not None]
            given = [dw for dw in dweights if dw is not None]
            found = iter(torch.autograd.grad(made, wanted, given, create_graph=True))
            gradients = [next(found) if need else None for need in needs]
        elif plain(*saved, *dweights):
            pieces = list(zip(ctx.groups, weights, dweights, left, strict=True))
            gradients = cpu.weights_gradients(needs, pieces, scores, masks, ctx.penalty)
        else:
            dw = torch.cat([_dense_gradient(*piece) for piece in zip(weights, dweights, left, strict=True)])
            args = *scores, *masks, *ctx.penalty
            gradients = reference.weights_backward(needs, (dw,), (torch.cat(weights),), *args)[:4]
        return None, None, *gradients, *(None,) * (len(masks) + len(ctx.penalty))


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uses: list[Uses], values: Tensor, *weights: Tensor) -> Tensor:
        out = values.new_empty(weights[0].shape[2], *values.shape[1:])
        for w, heads in _heads(weights):
            out[:, :, heads] = _swap(w @ _swap(values[:, :, heads]))
        ctx.uses = uses
        store(ctx, values, out, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, out, *weights = stored_tensors(ctx)
        if torch.is_grad_enabled() or not plain(grad, values, out, *weights):  # what is left is not differentiable
            dense = lambda values, *weights: _dense(weights, values)  # noqa: E731
            return None, *reference_gradients(dense, (values, *weights), ctx.needs_input_grad[1:], grad)
        gradient = without_autocast(_leave_uses, ctx, values, out, weights, grad.to(values.dtype))
        return None, gradient, *(None for _ in weights)


def _leave_uses(ctx: Any, values: Tensor, out: Tensor, weights: Sequence[Tensor], grad: Tensor) -> Tensor | None:
    """The gradient of the values, if it is needed; leaves what backward of the weights needs."""
    dvalues = torch.empty_like(values) if ctx.needs_input_grad[1] else None
    nodes = [node for node, _ in ctx.next_functions[1:]]
    for uses, node, (w, heads) in zip(ctx.uses, nodes, _heads(weights), strict=True):
        v, g = values[:, :, heads], grad[:, :, heads]
        if dvalues is not None:
            dvalues[:, :, heads] = _swap(w.transpose(2, 3) @ _swap(g))
        uses.leave(node, v, out[:, :, heads], g)
    return dvalues


def _dense_gradient(w: Tensor, dw: Tensor | None, left: Sequence[Use]) -> Tensor:
    """The gradient of a piece of W, as large as itself."""
    dw = torch.zeros_like(w) if dw is None else dw
    for values, _, grad in left:
        dw = dw + _swap(grad) @ _swap(values).transpose(2, 3)
    return dw


def make(groups: Sequence[slice], scores: Scores, masks: Masks, penalty: Penalty) -> tuple[Piece, ...]:
    """The weights in pieces of some heads each, on backend ``cpu``."""
    uses = [Uses() for _ in groups]
    return tuple(map(Piece, _Make.apply(uses, groups, *scores, *masks, *penalty), uses))


def average(pieces: tuple[Piece, ...], values: Tensor) -> Tensor:
    """W V, (T, B, H, C), of the weights in pieces by head and of values (S, B, H, C)."""
    if all(piece.serves(values) for piece in pieces):
        return _Average.apply([piece.uses for piece in pieces], values, *(piece.w for piece in pieces))
    return _dense([piece.w for piece in pieces], values)


def of_heads(pieces: tuple[Piece, ...], heads: slice) -> tuple[Piece, ...]:
    """Some heads of weights in pieces; whole pieces stay themselves, for a slice's gradient is as large as its base."""
    wanted = range(sum(len(piece) for piece in pieces))[heads]
    first, last = wanted.start, wanted.stop
    parts = []
    for piece in pieces:
        begin, end = max(first, 0), min(last, len(piece))
        if begin < end:
            parts.append(piece if end - begin == len(piece) else Piece(piece.w[begin:end]))
        first, last = first - len(piece), last - len(piece)
    return tuple(parts)


def _dense(weights: Sequence[Tensor], values: Tensor) -> Tensor:
    """W V by torch's operations."""
    averages = [_swap(w @ _swap(values[:, :, heads])) for w, heads in _heads(weights)]
    return averages[0] if len(averages) == 1 else torch.cat(averages, dim=2)


def _heads(weights: Sequence[Tensor]) -> list[tuple[Tensor, slice]]:
    """Weights in pieces, each with the heads that it is of."""
    found, first = [], 0
    for w in weights:
        found.append((w, slice(first, first + len(w))))
        first += len(w)
    return found


def _swap(x: Tensor) -> Tensor:
    """From (frames, B, heads, channels) to (heads, B, frames, channels), and back."""
    return x.permute(2, 1, 0, 3)
