"""The launchers of swoosh_linear around a backend's elementwise passes: the matrix products are torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.core.launch import as_empty_like, unsupported_dtype
from zipformer_kernels.core.op import Launchers


@dataclass(frozen=True, kw_only=True)
class SwooshLinearLaunchers(Launchers):
    """Launchers of the op ``swoosh_linear``, and the elementwise passes beside its products.

    Attributes:
        activate: ``(x, mask, kind, dtype)`` -> a = mask * swoosh(x) in `dtype`.
        differentiate: ``(da, x, mask, kind, with_a)`` -> dx = da * mask * swoosh'(x) in the dtype of x, with
            the strides of `torch.empty_like`, and, if `with_a`, a in the dtype of da, else None.
    """

    activate: Callable[..., Tensor]
    differentiate: Callable[..., tuple[Tensor, Tensor | None]]


def around_product(
    activate: Callable[..., Tensor],
    differentiate: Callable[..., tuple[Tensor, Tensor | None]],
    supports: Callable[..., str | None],
) -> SwooshLinearLaunchers:
    """The launchers made of two elementwise passes, and `supports`; see `SwooshLinearLaunchers` and `Launchers`."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, kind: str, dtype: torch.dtype):
        a = activate(x, mask, kind, dtype)
        return (F.linear(a, weight.to(dtype), None if bias is None else bias.to(dtype)),)

    def backward(
        needs: tuple[bool, ...],
        grads: tuple[Tensor],
        saved: tuple[()],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        kind: str,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        out_channels, in_channels = weight.shape
        dy = grads[0].reshape(-1, out_channels)
        dx = dweight = dbias = a = None
        if needs[0]:
            da = (dy @ weight.to(dtype)).view(x.shape)
            dx, a = differentiate(da, x, mask, kind, needs[1])
        elif needs[1]:
            a = activate(x, mask, kind, dtype)
        if needs[1]:
            dweight = as_empty_like((dy.t() @ a.reshape(-1, in_channels)).to(weight.dtype), weight)
        if needs[2]:
            dbias = dy.sum(0, dtype=bias.dtype)
        return dx, dweight, dbias, None

    return SwooshLinearLaunchers(supports, forward, backward, activate=activate, differentiate=differentiate)


def unsupported(
    dtypes: tuple[torch.dtype, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    dtype: torch.dtype,
) -> str | None:
    """Why kernels for `dtypes` cannot serve a call, or None if they can."""
    reason = unsupported_dtype(x, dtypes)
    if reason is None and dtype != x.dtype != torch.float32:
        return f"it takes {x.dtype} to itself only, not to {dtype}"
    return reason
