"""Uses of attention weights that leave what the scores' gradient needs to one backward of the weights, for all of them.

With use u averaging values V_u to O_u = W V_u, and G_u the gradient of O_u::

    dV_u = W^T G_u,   ds = W * (sum_u G_u V_u^T - D),   D = sum_u rowsum(G_u * O_u)

The gradient of W, as large as W, is never made: backward of a use gives dV_u and leaves V_u, O_u and G_u to backward of
the weights, which one kernel takes all gradients of scores from, a tile at a time. What a use leaves is kept apart for
each backward pass over a graph. Weights that are stored (stored.py) and weights that are computed again (recomputed.py)
differ in how they are read; a `Reader` knows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import aliases, reference_gradients, store, stored_tensors
from zipformer_kernels.core.call import autocast_dtype, plain, without_autocast
from zipformer_kernels.core.private import backward_pass, knows_backward_passes, will_execute
from zipformer_kernels.ops.attention.dense import dense, penalized_scores
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, Use

Tensors = Sequence[Tensor | None]
NO_PENALTY = Penalty()


class Reader(Protocol):
    """How weights of some heads are read from tensors, which it does not hold: those of a graph are saved by autograd.

    Attributes:
        heads: which heads of those that the tensors are of.
    """

    heads: slice

    def of_heads(self, heads: slice) -> Reader:
        """The reader of these heads of the tensors."""

    def average(self, tensors: Tensors, values: Tensor) -> Tensor:
        """W V, (T, B, heads, C), of any strides, from values (S, B, heads, C)."""

    def gated_average(self, tensors: Tensors, values: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """W V and (W V) y, y (T, B, heads, C), where that is as good as two steps; else None."""

    def values_gradient(self, tensors: Tensors, grad: Tensor) -> Tensor:
        """W^T G, (S, B, heads, C), of any strides, from the gradient of an average."""

    def dense_average(self, tensors: Tensors, values: Tensor) -> Tensor:
        """W V by torch's operations, differentiable."""


@dataclass
class Uses:
    """What the uses of weights have left, by backward pass.

    Attributes:
        penalty: what the weights' backward adds to the scores' gradient.
    """

    penalty: Penalty = NO_PENALTY
    left: dict[int, list[tuple[Use, Any]]] = field(default_factory=dict)

    def leave(self, weights: Any, use: Use) -> None:
        """Leaves what a use has to the pass that is going on, unless that will not come to the weights.

        Args:
            weights: the node of the graph that made them, as ``ctx.next_functions`` has it; None if they need nothing.
            use: of which heads of the weights, V_u, O_u and G_u.
        """
        if weights is not None and will_execute(weights):
            self.left.setdefault(backward_pass(), []).append((use, stream_of(use.grad)))

    def take(self) -> list[Use]:
        """All that was left in the pass that is going on.

        Autograd has a node wait for the stream of another only where a gradient goes from one to the other. What uses
        leave goes beside: so it is waited for here, if it comes from another stream.
        """
        left = self.left.pop(backward_pass(), [])
        for use, stream in left:
            if stream is not None and stream != (own := stream_of(use.grad)):
                own.wait_stream(stream)
                for x in use[1:]:
                    x.record_stream(own)
        return [use for use, _ in left]


def stream_of(x: Tensor) -> Any:
    """The stream on which the device of x works now; None on the CPU."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


@dataclass(frozen=True)
class Piece:
    """Weights of some heads.

    Attributes:
        reader: how they are read from the tensors.
        tensors: the first carries the weights' gradient in the graph.
        dtype: of the values that it averages.
        uses: where uses leave what backward of the weights wants; None where torch differentiates uses of a tensor.
    """

    reader: Reader
    tensors: tuple[Tensor | None, ...]
    dtype: torch.dtype
    uses: Uses | None = None

    def __len__(self) -> int:
        heads = self.reader.heads
        return heads.stop - heads.start

    @property
    def trained(self) -> bool:
        """Whether the weights have a gradient."""
        return self.tensors[0].requires_grad

    def of_heads(self, heads: slice) -> Piece:
        """Those of some of its heads."""
        first, last, _ = heads.indices(len(self))
        begin = self.reader.heads.start
        reader = self.reader.of_heads(slice(begin + first, begin + last))
        return Piece(reader, self.tensors, self.dtype, self.uses)

    def serves(self, *values: Tensor) -> bool:
        """Whether a use of values can read the tensors itself, and leave its part where there are gradients."""
        same = autocast_dtype(values[0]) in (None, self.dtype)
        return same and all(self.reads(x.dtype) for x in values) and plain(*values)

    def reads(self, dtype: torch.dtype) -> bool:
        """Whether a use of plain values in a dtype can read the tensors itself."""
        leaves = self.uses is not None and (knows_backward_passes or not torch.is_grad_enabled())
        return leaves and dtype == self.dtype


class Part(NamedTuple):
    """A piece without its tensors, as a node of the graph may hold it, and how many tensors it has."""

    reader: Reader
    uses: Uses | None
    count: int


def part_of(piece: Piece) -> Part:
    """A piece without its tensors."""
    return Part(piece.reader, piece.uses, len(piece.tensors))


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], values: Tensor, *tensors: Tensor | None) -> Tensor:
        out = without_autocast(averages, parts, values, tensors)
        ctx.parts = parts
        store(ctx, values, out if any(ctx.needs_input_grad[2:]) else None, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, out, *tensors = stored_tensors(ctx)
        if torch.is_grad_enabled() or not plain(grad, values, out, *tensors):  # what is left is not differentiable
            inputs, needs = (values, *tensors), ctx.needs_input_grad[1:]
            return None, *reference_gradients(partial(dense_averages, ctx.parts), inputs, needs, grad)
        nodes, wants = nodes_of(ctx, tensors, 1), ctx.needs_input_grad[1]
        args = ctx.parts, nodes, wants, values, out, tensors, grad.to(values.dtype)
        gradient = without_autocast(leave_uses, *args)
        return None, gradient, *(None for _ in tensors)


def average(pieces: Sequence[Piece], values: Tensor) -> Tensor:
    """W V, (T, B, H, C), of pieces that serve values (S, B, H, C), by head."""
    parts = [part_of(piece) for piece in pieces]
    tensors = [x for piece in pieces for x in piece.tensors]
    if not torch.is_grad_enabled():
        return without_autocast(averages, parts, values, tensors)
    return _Average.apply(parts, values, *tensors)


def nodes_of(ctx: Any, tensors: Tensors, first: int) -> list[Any]:
    """The nodes of the graph that made tensors: those of them that are not None are a node's inputs from `first` on."""
    functions = iter(ctx.next_functions[first:])
    return [None if x is None else next(functions)[0] for x in tensors]


def averages(parts: Sequence[Part], values: Tensor, tensors: Tensors) -> Tensor:
    """W V, (T, B, H, C), contiguous, of parts that serve values (S, B, H, C), without a graph.

    Args:
        parts: by head.
        values: as above.
        tensors: of all parts, one after the other.
    """
    if len(parts) == 1:
        return parts[0].reader.average(tensors, values).contiguous()
    out = None
    for part, own, heads in _split(parts, tensors):
        average = part.reader.average(own, values[:, :, heads])
        out = values.new_empty(average.shape[0], *values.shape[1:]) if out is None else out
        out[:, :, heads] = average
    return out


def leave_uses(
    parts: Sequence[Part],
    nodes: Sequence[Any],
    wants_values: bool,
    values: Tensor,
    out: Tensor | None,
    tensors: Tensors,
    grad: Tensor,
) -> Tensor | None:
    """The gradient of the values of `averages`; leaves what backward of the weights needs.

    Args:
        parts, values, tensors: of `averages`.
        nodes: the node of the graph that made each tensor, as `nodes_of` has them; None for one without gradient.
        wants_values: whether the gradient of the values is wanted.
        out: the result of `averages`; None if no part's weights have a gradient.
        grad: the gradient of `out`, in the dtype of the values.
    Returns:
        (S, B, H, C), or None if it is not wanted.
    """
    many, dvalues, first = len(parts) > 1, None, 0
    if wants_values and many:
        dvalues = torch.empty_like(values)
    for part, own, heads in _split(parts, tensors):
        v, g = (values[:, :, heads], grad[:, :, heads]) if many else (values, grad)
        if wants_values:
            gradient = part.reader.values_gradient(own, g)
            if many:
                dvalues[:, :, heads] = gradient
            else:
                dvalues = gradient
        if out is not None:
            part.uses.leave(nodes[first], Use(part.reader.heads, v, out[:, :, heads], g))
        first += part.count
    return dvalues


def dense_averages(parts: Sequence[Part], values: Tensor, *tensors: Tensor | None) -> Tensor:
    """W V by torch's operations."""
    averages = [part.reader.dense_average(own, values[:, :, heads]) for part, own, heads in _split(parts, tensors)]
    return averages[0] if len(averages) == 1 else torch.cat(averages, dim=2)


def _split(parts: Sequence[Part], tensors: Tensors) -> list[tuple[Part, Tensors, slice]]:
    """Each part with its tensors, and which heads of the values are its."""
    found, first, head = [], 0, 0
    for part in parts:
        last, end = first + part.count, head + part.reader.heads.stop - part.reader.heads.start
        found.append((part, tensors[first:last], slice(head, end)))
        first, head = last, end
    return found


def of_heads(pieces: Sequence[Piece], heads: slice) -> tuple[Piece, ...]:
    """Some heads of weights in pieces."""
    wanted = range(sum(len(piece) for piece in pieces))[heads]
    first, last = wanted.start, wanted.stop
    parts = []
    for piece in pieces:
        begin, end = max(first, 0), min(last, len(piece))
        if begin < end:
            parts.append(piece if end - begin == len(piece) else piece.of_heads(slice(begin, end)))
        first, last = first - len(piece), last - len(piece)
    return tuple(parts)


def differentiable_gradients(
    needs: Sequence[bool], scores: Scores, masks: Masks, penalty: Penalty, dw: Tensor | None
) -> list[Tensor | None]:
    """The gradients of q, k, p and e from that of W, with a graph of their own: where uses have left nothing.

    Args:
        needs: which are wanted.
        scores, masks, penalty: what W is made from.
        dw: the gradient of W, (H, B, T, S); None if it has none, and the penalty alone gives one.
    """
    if dw is None and penalty.weight == 0.0:
        return [None] * len(needs)
    scores = Scores(*aliases(scores))
    made = penalized_scores(scores, penalty) if dw is None else dense(scores, masks, penalty)
    wanted = [x for x, need in zip(scores, needs, strict=True) if need]
    given = torch.zeros_like(made) if dw is None else dw
    found = iter(torch.autograd.grad(made, wanted, given, create_graph=True))
    return [next(found) if need else None for need in needs]


def swap(x: Tensor) -> Tensor:
    """From (frames, B, heads, channels) to (heads, B, frames, channels), and back."""
    return x.permute(2, 1, 0, 3)
