"""Gated averaging in plain PyTorch: the specification that every backend is tested against, and the eager backend.

Shapes as in `zipformer_kernels.ops.attention.reference`, with as many sources as targets, and C channels per head::

    inner = W (x tanh(gate)),  out = inner y
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention import reference as attention
from zipformer_kernels.ops.sizes import merge_heads, split_heads


def nonlin_attention(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    e: Tensor | None,
    gate: Tensor,
    x: Tensor,
    y: Tensor,
    softmax: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    chunk: int,
    left_chunks: int,
) -> Tensor:
    """(W (x tanh(gate))) y, (T, B, H, C)."""
    masks = key_padding_mask, attn_mask, chunk, left_chunks
    return attention.attention(q, k, p, e, x * torch.tanh(gate), softmax, *masks, 0.0, 0.0) * y


def forward(*args: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """Returns out and, for backward, inner."""
    q, k, p, e, gate, x, y, *rest = args
    (inner,) = attention.forward(q, k, p, e, x * torch.tanh(gate), *rest, 0.0, 0.0)
    return inner * y, inner


def backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | None
) -> tuple[Tensor | None, ...]:
    """With v = x tanh(gate): dy = dout inner, dinner = dout y, dx = dv tanh(gate), dgate = dv x (1 - tanh(gate)^2)."""
    q, k, p, e, gate, x, y, *rest = args
    (inner,) = saved
    opened = torch.tanh(gate)
    scores = attention.backward((*needs[:4], True), (grads[0] * y,), (inner,), q, k, p, e, x * opened, *rest, 0.0, 0.0)
    dv = scores[4]
    return *scores[:4], dv * x * (1 - opened * opened), dv * opened, grads[0] * inner, None, None, None


def infer(projected: Tensor, bias: Tensor | None, weights: Tensor) -> Tensor:
    """(W (x tanh(s))) y of the thirds s, x, y of projected + bias, with W itself, (H, B, T, T)."""
    s, x, y = (projected if bias is None else projected + bias).chunk(3, dim=2)
    return merge_heads(weights @ split_heads(x * torch.tanh(s), weights.shape[0])) * y


eager = Launchers(
    lambda *_: None,
    forward,
    backward,
    variants={"infer": Launchers(lambda *_: None, lambda *args: (infer(*args).contiguous(),), None)},
)
