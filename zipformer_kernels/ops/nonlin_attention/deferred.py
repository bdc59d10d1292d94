"""NonlinAttention between its projections in training, as one use of weights that leaves its part of their gradient.

With s, x, y the thirds of a projection, V = x tanh(s) and O = W V::

    out = O y;   G = dout y,  dy = dout O,  dV = W^T G,  ds = dV x (1 - tanh(s)^2),  dx = dV tanh(s)

V, O and G are what the use leaves to backward of the weights, see `zipformer_kernels.ops.attention.deferred`. V is
computed again in backward, and the gradients of the thirds are written side by side where the thirds lie so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import reference_gradients, store, stored_tensors
from zipformer_kernels.core.call import plain, without_autocast
from zipformer_kernels.core.joint import empty_beside
from zipformer_kernels.ops.attention.deferred import Part, Piece, Tensors, nodes_of, part_of
from zipformer_kernels.ops.attention.scores import Use
from zipformer_kernels.ops.nonlin_attention.gates import Gates


class _GatedAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Gates, part: Part, s: Tensor, x: Tensor, y: Tensor, *tensors: Tensor | None) -> Tensor:
        average, out = without_autocast(forward, gates, part, s, x, y, tensors)
        ctx.gates, ctx.part = gates, part
        store(ctx, s, x, y, average, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        s, x, y, average, *tensors = stored = stored_tensors(ctx)
        if torch.is_grad_enabled() or not plain(grad, *stored):  # what is left could not be differentiated
            dense = lambda s, x, y, *tensors: (  # noqa: E731
                ctx.part.reader.dense_average(tensors, _by_head(x * torch.tanh(s), ctx.part)).flatten(2) * y
            )
            gradients = reference_gradients(dense, (s, x, y, *tensors), ctx.needs_input_grad[2:], grad)
            return None, None, *gradients
        node, needs = nodes_of(ctx, tensors, 3)[0], ctx.needs_input_grad[2:5]
        args = ctx.gates, ctx.part, node, needs, grad.to(x.dtype), s, x, y, average, tensors
        thirds = without_autocast(backward, *args)
        return None, None, *thirds, *(None for _ in tensors)


def serves(pieces: Sequence[Piece], s: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether `gated_average` can take these weights and thirds."""
    return len(pieces) == 1 and pieces[0].serves(s, x, y)


def gated_average(gates: Gates, piece: Piece, s: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(W (x tanh(s))) y, (T, B, H * C)."""
    part = part_of(piece)
    if not torch.is_grad_enabled():
        return without_autocast(forward, gates, part, s, x, y, piece.tensors)[1]
    return _GatedAverage.apply(gates, part, s, x, y, *piece.tensors)


def forward(gates: Gates, part: Part, s: Tensor, x: Tensor, y: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The average before the second gate, (T, B, H * C), and the result, without a graph."""
    values = _by_head(gates.open_(s, x), part)
    both = part.reader.gated_average(tensors, values, _by_head(y, part))
    if both is not None:
        average, out = both
        return average.flatten(2), out.flatten(2)
    average = part.reader.average(tensors, values).flatten(2)
    return average, gates.close(average, y)


def backward(
    gates: Gates,
    part: Part,
    node: Any,
    needs: Sequence[bool],
    grad: Tensor,
    s: Tensor,
    x: Tensor,
    y: Tensor,
    average: Tensor,
    tensors: Tensors,
) -> list[Tensor | None]:
    """The gradients of s, x and y; leaves what backward of the weights needs.

    Args:
        gates, part, s, x, y, tensors: of `forward`.
        node: the node of the graph that made the weights, as `nodes_of` has it; None if they have no gradient.
        needs: which of the three gradients are wanted.
        grad: the gradient of the result, in the dtype of x.
        average: as `forward` returned it.
    """
    ds, dx, dy = (d if d.stride(2) == 1 else d.new_empty(d.shape) for d in empty_beside(s, x, y))
    inner = gates.close_backward(grad, average, y, dy)
    values = None
    if needs[0] or needs[1]:
        dvalues = part.reader.values_gradient(tensors, _by_head(inner, part)).flatten(2)
        values = None if node is None else x.new_empty(x.shape)
        gates.open_backward(dvalues, s, x, ds, dx, values)
    elif node is not None:
        values = gates.open_(s, x)
    if node is not None:
        left = (_by_head(t, part) for t in (values, average, inner))
        part.uses.leave(node, Use(part.reader.heads, *left))
    return [d if need else None for d, need in zip((ds, dx, dy), needs, strict=True)]


def _by_head(x: Tensor, part: Part) -> Tensor:
    """(T, B, H * C) as (T, B, H, C)."""
    return x.unflatten(2, (part.reader.heads.stop - part.reader.heads.start, -1))
