"""The middle of a self-attention: averages of values with shared weights, which one backward serves for all uses."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.branch.node import Asked, Back, Tensors, Weights
from zipformer_kernels.branch.products import Products
from zipformer_kernels.ops.attention import deferred
from zipformer_kernels.ops.attention.deferred import Part
from zipformer_kernels.ops.sizes import split_last


class AverageMiddle(NamedTuple):
    """a = W h, for each head; the context are the tensors that the weights are read from.

    Attributes:
        parts: of the weights, by head.
        heads: how many there are.
    """

    parts: tuple[Part, ...]
    heads: int

    def forward(
        self, products: Products, x: Tensor, weights: Weights, context: Tensors, stores: bool
    ) -> tuple[Tensor, Tensors]:
        values = F.linear(x, weights.first, weights.first_bias)
        averages = deferred.averages(self.parts, split_last(values, self.heads), context).flatten(2)
        return averages, (values, averages)

    def backward(
        self, products: Products, grad: Tensor, weights: Weights, context: Tensors, stored: Tensors, asked: Asked
    ) -> Back:
        _, out = stored
        da, split = grad @ weights.last, (split_last(x, self.heads) for x in stored)
        given = self.parts, asked.nodes, asked.hidden, *split, context, split_last(da, self.heads)
        dvalues = deferred.leave_uses(*given)
        return Back(None if dvalues is None else dvalues.flatten(2).contiguous(), None, out)

    def reference(self, x: Tensor, weights: Weights, context: Tensors) -> Tensor:
        values = F.linear(x, weights.first, weights.first_bias)
        return deferred.dense_averages(self.parts, split_last(values, self.heads), *context).flatten(2)
