"""The middle of a convolution module: gate, depthwise convolution and SwooshR, one kernel each way."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.branch.node import Asked, Back, Change, Tensors, Weights
from zipformer_kernels.branch.products import Products
from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.ops.conv_module import reference as conv
from zipformer_kernels.ops.conv_module.launchers import ConvLaunchers
from zipformer_kernels.ops.swoosh import reference as curve


class ConvMiddle(NamedTuple):
    """a = SwooshR(y), y the convolution of the gated halves of h.

    The context are five parameters of the convolution, as `conv_module` takes them, and the padding.

    Attributes:
        launchers: of the op.
        chunk_size: frames per chunk; negative for no chunks.
        gate: what acts on the gradient of the gate's input s, or None.
        changes: what acts on the gradient of y, in the order of the modules.
    """

    launchers: ConvLaunchers
    chunk_size: int
    gate: Change | None
    changes: tuple[Change, ...]

    def forward(
        self, products: Products, x: Tensor, weights: Weights, context: Tensors, stores: bool
    ) -> tuple[Tensor, Tensors]:
        hidden = F.linear(x, weights.first, weights.first_bias)
        y, a = self.launchers.activated(hidden, *context, self.chunk_size, hidden.dtype, stores)
        return a, (hidden, y)

    def backward(
        self, products: Products, grad: Tensor, weights: Weights, context: Tensors, stored: Tensors, asked: Asked
    ) -> Back:
        hidden, y = stored
        da = grad @ weights.last
        needs = asked.hidden, *asked.context[:5]
        if not any(needs):
            return Back(None, None, curve.swoosh(y, "r"))
        if self.changes:
            a, dy = curve.swoosh(y, "r"), da * curve.derivative(y, "r")
            for change in reversed(self.changes):
                dy = change(dy, y)
            dhidden, dconv, sums = self.launchers.gradient(needs, dy, hidden, *context, self.chunk_size)
        else:
            given = needs, da, y, hidden, *context, self.chunk_size
            dhidden, dconv, a, sums = self.launchers.activated_gradient(*given)
        if self.gate is not None and dhidden is not None:
            ds, s = (x.chunk(2, dim=2)[1] for x in (dhidden, hidden))
            ds.copy_(self.gate(ds, s))
            sums = None
        return Back(dhidden, sums, a, (*dconv, None))

    def reference(self, x: Tensor, weights: Weights, context: Tensors) -> Tensor:
        a, s = F.linear(x, weights.first, weights.first_bias).chunk(2, dim=2)
        if self.gate is not None:
            s = gradient_hook(s, self.gate, s)
        y = conv.conv_module(a, s, *context, self.chunk_size, x.dtype)
        for change in self.changes:
            y = gradient_hook(y, change, y)
        return curve.swoosh(y, "r")
