"""swoosh_linear in plain PyTorch: what every backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.ops.swoosh.reference import derivative, swoosh


def swoosh_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, kind: str, dtype: torch.dtype
) -> Tensor:
    """linear(swoosh(x) * mask, weight, bias), the product in `dtype`."""
    bias = None if bias is None else bias.to(dtype)
    return F.linear(activate(x, mask, kind, dtype), weight.to(dtype), bias)


def activate(x: Tensor, mask: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    """swoosh(x) * mask, taken in float32 or better and rounded to `dtype`."""
    a = swoosh(_widened(x), kind)
    return (a if mask is None else a * _widened(mask)).to(dtype)


def differentiate(da: Tensor, x: Tensor, mask: Tensor | None, kind: str, with_a: bool) -> tuple[Tensor, Tensor | None]:
    """dx from the gradient of a = activate(x, ...); and a itself, of the dtype of its gradient."""
    slope = derivative(x, kind)
    dx = da * (slope if mask is None else slope * _widened(mask))
    return dx.to(x.dtype), activate(x, mask, kind, da.dtype) if with_a else None


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def feed_forward(
    src: Tensor, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, kind: str
) -> Tensor:
    """src + linear(swoosh(linear(src, in_weight, in_bias)), out_weight, out_bias)."""
    return src + swoosh_linear(F.linear(src, in_weight, in_bias), out_weight, out_bias, None, kind, src.dtype)
