"""The gates of NonlinAttention around an average over frames: what a backend offers of the op beside the op itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.core.op import Launchers


class Gates(NamedTuple):
    """The gates, and their gradients, of tensors (T, B, C) of one dtype. They hand nothing to autograd.

    Tensors to fill have channels of stride 1; the others may have any strides.

    Attributes:
        open_: ``(s, x)`` -> the values x tanh(s), contiguous.
        close: ``(average, y)`` -> average y, contiguous.
        close_backward: ``(grad, average, y, dy)`` -> inner = grad y, as the average lies in memory; fills dy.
        open_backward: ``(dvalues, s, x, ds, dx, values)``: fills ds and dx, and values = x tanh(s) if given, not None.
    """

    open_: Callable[[Tensor, Tensor], Tensor]
    close: Callable[[Tensor, Tensor], Tensor]
    close_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    open_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True, kw_only=True)
class GatedLaunchers(Launchers):
    """Launchers of the op ``nonlin_attention``, and its gates.

    Attributes:
        gates: for tensors of any dtype that the backend takes.
    """

    gates: Gates


def _open(s: Tensor, x: Tensor) -> Tensor:
    return torch.mul(x, torch.tanh(s), out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _close(average: Tensor, y: Tensor) -> Tensor:
    return torch.mul(average, y, out=torch.empty(y.shape, dtype=y.dtype, device=y.device))


def _close_backward(grad: Tensor, average: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    torch.mul(grad, average, out=dy)
    return torch.mul(grad, y, out=torch.empty_like(average))


def _open_backward(dvalues: Tensor, s: Tensor, x: Tensor, ds: Tensor, dx: Tensor, values: Tensor | None) -> None:
    gate = torch.tanh(s)
    if values is not None:
        torch.mul(x, gate, out=values)
    torch.mul(dvalues, gate, out=dx)
    ds.copy_(torch.ops.aten.tanh_backward(dvalues * x, gate))


BY_TORCH = Gates(_open, _close, _close_backward, _open_backward)
"""The gates by torch's operations."""
