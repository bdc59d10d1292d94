"""Swoosh in plain PyTorch: the specification that every backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = {"l": 4.0, "r": 1.0}
OFFSET = {"l": 0.035, "r": 0.313261687}
SLOPE = 0.08
LINEAR = 40.0  # from here on log(1 + exp(z)) is z, in float64 too


def swoosh(x: Tensor, kind: str) -> Tensor:
    """log(1 + exp(x - shift)) - 0.08 x - offset, finite for every finite x; half precision goes through float32."""
    wide = _widened(x)
    # Unlike torch.logaddexp, softplus can be written by every exporter.
    return (F.softplus(wide - SHIFT[kind], threshold=LINEAR) - SLOPE * wide - OFFSET[kind]).to(x.dtype)


def derivative(x: Tensor, kind: str) -> Tensor:
    """sigmoid(x - shift) - 0.08, in float32 or float64."""
    return torch.sigmoid(_widened(x) - SHIFT[kind]) - SLOPE


def forward(x: Tensor, kind: str) -> tuple[Tensor]:
    """y = swoosh(x)."""
    return (swoosh(x, kind),)


def backward(needs: tuple[bool], grads: tuple[Tensor], saved: tuple[()], x: Tensor, kind: str) -> tuple[Tensor]:
    """dx = dy * derivative(x)."""
    return ((grads[0] * derivative(x, kind)).to(x.dtype),)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
