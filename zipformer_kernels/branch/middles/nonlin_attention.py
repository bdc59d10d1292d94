"""The middle of NonlinAttention: gated values, averaged with the weights of one head and gated again."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.branch.node import Asked, Back, Change, Tensors, Weights
from zipformer_kernels.branch.products import Products
from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.joint import side_by_side
from zipformer_kernels.ops.attention import deferred
from zipformer_kernels.ops.attention.deferred import Part
from zipformer_kernels.ops.nonlin_attention import deferred as gated
from zipformer_kernels.ops.nonlin_attention.gates import Gates
from zipformer_kernels.ops.sizes import split_last


class GatedMiddle(NamedTuple):
    """a = (W (x tanh(s))) y of the thirds s, x, y of h; the context are the tensors that W is read from.

    Attributes:
        gates: of the backend.
        part: of the weights.
        gate, value: what acts on the gradients of s and of x, or None.
    """

    gates: Gates
    part: Part
    gate: Change | None
    value: Change | None

    def forward(
        self, products: Products, x: Tensor, weights: Weights, context: Tensors, stores: bool
    ) -> tuple[Tensor, Tensors]:
        hidden = F.linear(x, weights.first, weights.first_bias)
        average, out = gated.forward(self.gates, self.part, *hidden.chunk(3, dim=2), context)
        return out, (hidden, average, out)

    def backward(
        self, products: Products, grad: Tensor, weights: Weights, context: Tensors, stored: Tensors, asked: Asked
    ) -> Back:
        hidden, average, out = stored
        thirds = hidden.chunk(3, dim=2)
        da, needs = grad @ weights.last, (True,) * 3
        ds, dx, dy = gated.backward(self.gates, self.part, asked.nodes[0], needs, da, *thirds, average, context)
        for change, d, x in ((self.gate, ds, thirds[0]), (self.value, dx, thirds[1])):
            if change is not None:
                d.copy_(change(d, x))
        dhidden = side_by_side(ds, dx, dy)
        return Back(torch.cat((ds, dx, dy), dim=2) if dhidden is None else dhidden, None, out)

    def reference(self, x: Tensor, weights: Weights, context: Tensors) -> Tensor:
        s, x, y = F.linear(x, weights.first, weights.first_bias).chunk(3, dim=2)
        if self.gate is not None:
            s = gradient_hook(s, self.gate, s)
        if self.value is not None:
            x = gradient_hook(x, self.value, x)
        heads = self.part.reader.heads.stop - self.part.reader.heads.start
        values = split_last(x * torch.tanh(s), heads)
        return deferred.dense_averages([self.part], values, *context).flatten(2) * y
