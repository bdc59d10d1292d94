"""Gated averaging in plain PyTorch: the specification that every backend is tested against.

Shapes as in `zipformer_kernels.ops.attention.reference`, with as many sources as targets, and C channels per head::

    inner = W (x tanh(gate)),  out = inner y
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.ops.attention import reference as attention
from zipformer_kernels.ops.attention.scores import grouped
from zipformer_kernels.ops.sizes import merge_heads, split_heads


def nonlin_attention(*args: Tensor | int | None) -> Tensor:
    """(W (x tanh(gate))) y, (T, B, H, C).

    Args:
        args: q, k, p, e (`Scores`); gate, x, y, (T, B, H, C); the rows of the softmax, which are not read here; and the
            four of `Masks`.
    """
    scores, (gate, x, y, softmax), masks, penalty = grouped(4, args)
    return attention.attention(*scores, x * torch.tanh(gate), softmax, *masks, *penalty) * y


def forward(*args: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """Returns out and, for backward, inner."""
    scores, (gate, x, y, softmax), masks, penalty = grouped(4, args)
    (inner,) = attention.forward(*scores, x * torch.tanh(gate), softmax, *masks, *penalty)
    return inner * y, inner


def backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | None
) -> tuple[Tensor | None, ...]:
    """With v = x tanh(gate): dy = dout inner, dinner = dout y, dx = dv tanh(gate), dgate = dv x (1 - tanh(gate)^2)."""
    scores, (gate, x, y, softmax), masks, penalty = grouped(4, args)
    (inner,) = saved
    opened = torch.tanh(gate)
    use = *scores, x * opened, softmax, *masks, *penalty
    *dscores, dv = attention.backward((*needs[:4], True), (grads[0] * y,), (inner,), *use)[:5]
    return *dscores, dv * x * (1 - opened * opened), dv * opened, grads[0] * inner, None, None, None


def infer(projected: Tensor, bias: Tensor | None, weights: Tensor) -> Tensor:
    """(W (x tanh(s))) y of the thirds s, x, y of projected + bias, with W itself, (H, B, T, T)."""
    s, x, y = (projected if bias is None else projected + bias).chunk(3, dim=2)
    return merge_heads(weights @ split_heads(x * torch.tanh(s), weights.shape[0])) * y
