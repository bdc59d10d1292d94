"""Matrix products of rows by PyTorch: what tests compare with, and what runs where Triton does not.

It takes every dtype and device. `zipformer_kernels.branch.products.interface.Products` says what each function does.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.branch.products.interface import Dropout, Products
from zipformer_kernels.ops.swoosh_linear import eager
from zipformer_kernels.ops.swoosh_linear.product import SwooshLinearLaunchers

MM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8


@lru_cache
def around(passes: SwooshLinearLaunchers) -> Products:
    """Products by PyTorch, with a backend's passes for Swoosh beside them."""

    def activated(
        x: Tensor, weight: Tensor, bias: Tensor | None, dropout: Dropout | None, kind: str, stores: bool
    ) -> tuple[Tensor | None, Tensor]:
        hidden = F.linear(x, weight, _in(x.dtype, bias))
        return hidden if stores else None, passes.activate(hidden, _mask(dropout), kind, hidden.dtype)

    def activated_gradient(
        grad: Tensor, weight: Tensor, hidden: Tensor, dropout: Dropout | None, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        dhidden, a = passes.differentiate(grad @ weight, hidden, _mask(dropout), kind, True)
        return dhidden, a, _sums(dhidden)

    return Products(activated, activated_gradient, _added, _added_gradient, weight_gradient, _lowered, _totals)


def _mask(dropout: Dropout | None) -> Tensor | None:
    return None if dropout is None else dropout.mask()


def _added(
    src: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    product = F.linear(x, weight, _in(x.dtype, bias))
    y = (src + product if chosen is None else torch.addcmul(src, product, chosen)).to(src.dtype)
    return y, y.to(low)


def _added_gradient(
    grad: Tensor, dhidden: Tensor, weight: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sums are left to who wants them: they are a pass of their own here."""
    if grad.dtype == dhidden.dtype:
        rows = torch.addmm(grad.flatten(0, 1), dhidden.flatten(0, 1), weight)
        dsrc = rows.view(grad.shape)
    else:
        dsrc = (grad + dhidden @ weight).to(grad.dtype)
    return dsrc, dsrc.to(low), None


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T x over all rows, (out, in), in `dtype`; accumulated in float32."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if dtype == x.dtype:
        return torch.mm(grad.t(), x)
    if dtype == torch.float32 and multiplies_widely(x):
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return torch.mm(grad.t(), x).to(dtype)


def multiplies_widely(x: Tensor) -> bool:
    """Whether torch multiplies tensors like x, in half precision, to a result in float32."""
    return MM_HAS_OUT_DTYPE and x.is_cuda and torch.version.hip is None


def _lowered(grad: Tensor, chosen: Tensor | None, low: torch.dtype) -> tuple[Tensor, Tensor]:
    lowered = (grad if chosen is None else chosen * grad).to(low)
    return lowered, _sums(lowered)


def _totals(sums: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return _total(sums), None if other is None else _total(other)


def _total(sums: Tensor) -> Tensor:
    return sums[0] if len(sums) == 1 else sums.sum(0)


def _in(dtype: torch.dtype, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _sums(x: Tensor) -> Tensor:
    """In one part."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.flatten(0, -2).sum(0, keepdim=True, dtype=wide)


BY_TORCH = around(eager.launchers)
