"""Matrix products of rows in PyTorch's own operations: what tests compare with, and what runs where Triton does not.

It takes every dtype and device. `zipformer_kernels.branch.products.interface.Products` says what each function does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.branch.products.interface import Dropout, Products
from zipformer_kernels.ops.swoosh import reference as curve

MM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8


def _activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, dropout: Dropout | None, kind: str, stores: bool
) -> tuple[Tensor | None, Tensor]:
    hidden = F.linear(x, weight, _in(x.dtype, bias))
    return hidden if stores else None, _dropped_swoosh(hidden, dropout, kind)


def _activated_gradient(
    grad: Tensor, weight: Tensor, hidden: Tensor, dropout: Dropout | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    da = grad @ weight
    slope = curve.derivative(hidden, kind)
    dhidden = (da * slope if dropout is None else da * dropout.mask() * slope).to(hidden.dtype)
    return dhidden, _dropped_swoosh(hidden, dropout, kind), _sums(dhidden)


def _added(
    src: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor | None, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    product = F.linear(x, weight, _in(x.dtype, bias))
    y = (src + product if chosen is None else src + chosen * product).to(src.dtype)
    return y, y.to(low)


def _added_gradient(grad: Tensor, dhidden: Tensor, weight: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dsrc = (grad + dhidden @ weight).to(grad.dtype)
    dsrc_low = dsrc.to(low)
    return dsrc, dsrc_low, _sums(dsrc_low)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T x over all rows, (out, in), in `dtype`; accumulated in float32."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if dtype == torch.float32 != x.dtype and multiplies_widely(x):
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return torch.mm(grad.t(), x).to(dtype)


def multiplies_widely(x: Tensor) -> bool:
    """Whether torch multiplies tensors like x, in half precision, to a result in float32."""
    return MM_HAS_OUT_DTYPE and x.is_cuda


def _lowered(grad: Tensor, chosen: Tensor | None, low: torch.dtype) -> tuple[Tensor, Tensor]:
    lowered = (grad if chosen is None else chosen * grad).to(low)
    return lowered, _sums(lowered)


def _totals(sums: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return _total(sums), None if other is None else _total(other)


def _total(sums: Tensor) -> Tensor:
    return sums[0] if len(sums) == 1 else sums.sum(0)


def _in(dtype: torch.dtype, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _dropped_swoosh(hidden: Tensor, dropout: Dropout | None, kind: str) -> Tensor:
    if dropout is None:
        return curve.swoosh(hidden, kind)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (curve.swoosh(hidden.to(wide), kind) * dropout.mask()).to(hidden.dtype)


def _sums(x: Tensor) -> Tensor:
    """In one part."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.flatten(0, -2).sum(0, keepdim=True, dtype=wide)


BY_TORCH = Products(_activated, _activated_gradient, _added, _added_gradient, weight_gradient, _lowered, _totals)
