"""Gated averaging on the CPU: the gates in torch, linear in the frames, around the compiled kernels of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention import native as attention


def _forward(*args: Tensor | int | None) -> tuple[Tensor, Tensor]:
    q, k, p, e, gate, x, y, *rest = args
    (inner,) = attention.forward(q, k, p, e, torch.tanh(gate).mul_(x), *rest, 0.0, 0.0)
    return torch.mul(inner, y, out=torch.empty_like(inner)), inner


def _backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | None
) -> tuple[Tensor | None, ...]:
    q, k, p, e, gate, x, y, *rest = args
    (inner,), (grad,) = saved, grads
    opened = torch.tanh(gate)
    wanted = *needs[:4], needs[4] or needs[5]
    *scores, dv = attention.backward(wanted, (grad * y,), saved, q, k, p, e, x * opened, *rest, 0.0, 0.0)[:5]
    dgate = torch.ops.aten.tanh_backward(dv * x, opened) if needs[4] else None
    dx = dv * opened if needs[5] else None
    return *scores, dgate, dx, grad * inner if needs[6] else None, None, None, None


cpu = Launchers(attention.unsupported, _forward, _backward, attention.worthwhile)
