"""The reference of conv_module, of its variants and of its passes in a layer as a backend, which serves every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import backward_of
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.conv_module.launchers import ConvLaunchers, Gradients
from zipformer_kernels.ops.conv_module.reference import conv_module, infer, stream
from zipformer_kernels.ops.swoosh.reference import derivative, swoosh


def _forward(*args: object) -> tuple[Tensor]:
    return (conv_module(*args),)


def _dense(function: Callable[..., tuple[Tensor, ...]], *args: object) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in function(*args))


def _convolved(projected: Tensor, *rest: Any) -> Tensor:
    """The op's result from both halves of a projection."""
    return conv_module(*projected.chunk(2, dim=2), *rest)


def _activated(projected: Tensor, *rest: Any) -> tuple[Tensor | None, Tensor]:
    *rest, stores = rest
    y = _convolved(projected, *rest).contiguous()
    return y if stores else None, swoosh(y, "r")


def _activated_gradient(
    needs: Sequence[bool], da: Tensor, y: Tensor, projected: Tensor, *conv: Any
) -> tuple[Tensor | None, list[Tensor | None], Tensor, Tensor | None]:
    dy = (da * derivative(y, "r")).to(y.dtype)
    dprojected, gradients, sums = _gradient(needs, dy, projected, *conv)
    return dprojected, gradients, swoosh(y, "r"), sums


def _gradient(needs: Sequence[bool], dy: Tensor, projected: Tensor, *conv: Any) -> Gradients:
    dprojected, *gradients = backward_of(_convolved)(needs, (dy,), (), projected, *conv, dy.dtype)
    if dprojected is None:
        return None, gradients, None
    sums = dprojected.sum((0, 1), keepdim=True, dtype=torch.promote_types(projected.dtype, torch.float32))
    return dprojected.contiguous(), gradients, sums[0]


launchers = ConvLaunchers(
    lambda *_: None,
    _forward,
    backward_of(conv_module),
    variants={
        "infer": Launchers(lambda *_: None, partial(_dense, infer), None),
        "stream": Launchers(lambda *_: None, partial(_dense, stream), None),
    },
    activated=_activated,
    activated_gradient=_activated_gradient,
    gradient=_gradient,
)
