"""The middle of a feed-forward: Swoosh and a dropout that is shared over time, both inside of the products' kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.branch.node import Asked, Back, Change, Tensors, Weights
from zipformer_kernels.branch.products import Dropout, Products
from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.ops.swoosh_linear.reference import activate


class SwooshMiddle(NamedTuple):
    """a = mask * swoosh(h); the context are the draws of the dropout, (1, batch, hidden), or None.

    Attributes:
        kind: of Swoosh.
        rate: of the dropout.
        change: what acts on the gradient of h, or None.
    """

    kind: str
    rate: float
    change: Change | None

    def forward(
        self, products: Products, x: Tensor, weights: Weights, context: Tensors, stores: bool
    ) -> tuple[Tensor, Tensors]:
        hidden, a = products.activated(x, weights.first, weights.first_bias, self._dropout(context), self.kind, stores)
        return a, (hidden,)

    def backward(
        self, products: Products, grad: Tensor, weights: Weights, context: Tensors, stored: Tensors, asked: Asked
    ) -> Back:
        (hidden,) = stored
        dhidden, a, sums = products.activated_gradient(grad, weights.last, hidden, self._dropout(context), self.kind)
        if self.change is not None:
            dhidden, sums = self.change(dhidden, hidden), None
        return Back(dhidden, sums, a)

    def reference(self, x: Tensor, weights: Weights, context: Tensors) -> Tensor:
        hidden = F.linear(x, weights.first, weights.first_bias)
        if self.change is not None:
            hidden = gradient_hook(hidden, self.change, hidden)
        dropout = self._dropout(context)
        return activate(hidden, None if dropout is None else dropout.mask(), self.kind, hidden.dtype)

    def _dropout(self, context: Tensors) -> Dropout | None:
        (draws,) = context
        return None if draws is None else Dropout(draws, self.rate)
