"""A pointwise branch that is computed of so many rows at a time, and again in backward, so that what lies between stays
in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.core.autograd import reference_gradients, store, stored_tensors
from zipformer_kernels.core.backend import requested, use_backend
from zipformer_kernels.core.call import plain, without_autocast


class Activation(Protocol):
    """What stands between the two products of a branch: of each row by itself, and of the same shape."""

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """The activation of hidden + bias, rows of which it may overwrite; called for each part, of every sequence."""

    def backward(self, grad: Tensor, hidden: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of hidden from that of the activation, and the activation once more; may overwrite both."""

    def reference(self, hidden: Tensor) -> Tensor:
        """The activation of all rows at once, differentiable: for gradients of gradients."""


class _PointwiseBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        rows: int,
        chosen: Sequence[bool],
        src: Tensor,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
    ) -> Tensor:
        ctx.activation, ctx.rows, ctx.chosen, ctx.request = activation, rows, chosen, requested()
        store(ctx, x, weight1, bias1, weight2, bias2)
        y = torch.empty_like(src, memory_format=torch.contiguous_format)
        for sequence, part in _parts(x, rows):
            a = activation.forward(x[sequence, part] @ weight1.t(), bias1)
            if chosen[sequence]:
                torch.add(src[sequence, part], bias2, out=y[sequence, part])
                y[sequence, part].addmm_(a, weight2.t())
            else:
                y[sequence, part] = src[sequence, part]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs, tensors = ctx.needs_input_grad[4:], stored_tensors(ctx)
        with use_backend(ctx.request):
            gradients = _PointwiseBranch._gradients(ctx, grad, needs, tensors)
        return None, None, None, grad, *gradients

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor, needs: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        if torch.is_grad_enabled() or not plain(grad, *tensors):  # create_graph=True: the parts would all be stored
            chosen = torch.tensor(ctx.chosen, dtype=grad.dtype, device=grad.device).view(-1, 1, 1)
            return reference_gradients(partial(_branch, ctx.activation), tensors, needs, grad * chosen)
        return without_autocast(_gradients, ctx, tensors, grad.contiguous(), needs)


def _branch(
    activation: Activation, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """The branch of all rows at once, differentiable."""
    return F.linear(activation.reference(F.linear(x, weight1, bias1)), weight2, bias2)


def _gradients(ctx: Any, tensors: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of x and of the parameters; those of parameters are summed part by part, in order."""
    x, weight1, bias1, weight2, _ = tensors
    sums = [torch.zeros_like(t) if need else None for t, need in zip(tensors[1:], needs[1:], strict=True)]
    dweight1, dbias1, dweight2, dbias2 = sums
    dx = torch.empty_like(x) if needs[0] else None
    for sequence, part in _parts(x, ctx.rows):
        if not ctx.chosen[sequence]:
            if dx is not None:
                dx[sequence, part] = 0
            continue
        rows, dy = x[sequence, part], grad[sequence, part]
        dhidden, a = ctx.activation.backward(dy @ weight2, rows @ weight1.t(), bias1)
        if dx is not None:
            torch.mm(dhidden, weight1, out=dx[sequence, part])
        if dweight1 is not None:
            dweight1.addmm_(dhidden.t(), rows)
        if dbias1 is not None:
            dbias1.add_(dhidden.sum(0))
        if dweight2 is not None:
            dweight2.addmm_(dy.t(), a)
        if dbias2 is not None:
            dbias2.add_(dy.sum(0))
    return [dx, *sums]


def _parts(x: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    for sequence in range(x.shape[0]):
        for begin in range(0, x.shape[1], rows):
            yield sequence, slice(begin, begin + rows)


def pointwise_branch(
    activation: Activation,
    rows: int,
    chosen: Sequence[bool],
    src: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """src + activation(x W1^T + b1) W2^T + b2 in the sequences that get the branch, src in the others.

    Saved for backward are x and the parameters. Backward computes the hidden rows once more, of a part at a time, and
    nothing of sequences without. All tensors are of one dtype, on the CPU.

    Args:
        activation: what stands between the products.
        rows: how many rows a part has.
        chosen: for each sequence, whether it gets the branch.
        src: (batch, rows of a sequence, channels).
        x: of the same shape.
        weight1, bias1: (hidden, channels), (hidden,).
        weight2, bias2: (channels, hidden), (channels,).
    """
    return _PointwiseBranch.apply(activation, rows, chosen, src, x, weight1, bias1, weight2, bias2)
