"""Swoosh through the compiled module: what the CPU's and CUDA's launchers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zipformer_kernels.core.launch import DTYPE_CODES, dense, like, pointer, unsupported_dtype
from zipformer_kernels.core.op import Launchers

KINDS = {"l": 0, "r": 1}


def _forward(call: Callable[..., None], x: Tensor, kind: str) -> tuple[Tensor]:
    x = dense(x)
    y = torch.empty_like(x)
    call("swoosh_forward", x, pointer(x), pointer(y), x.numel(), DTYPE_CODES[x.dtype], KINDS[kind])
    return (y,)


def _backward(call: Callable[..., None], needs: tuple, grads: tuple, saved: tuple, x: Tensor, kind: str):
    x = dense(x)
    dy = like(grads[0], x)
    dx = torch.empty_like(x)
    call("swoosh_backward", x, *map(pointer, (dy, x, dx)), x.numel(), DTYPE_CODES[x.dtype], KINDS[kind])
    return (dx,)


def launchers_by(call: Callable[..., None], dtypes: tuple[torch.dtype, ...]) -> Launchers:
    """The launchers whose kernels `call` calls, which take `dtypes`."""
    return Launchers(
        supports=lambda x, kind: unsupported_dtype(x, dtypes),
        forward=partial(_forward, call),
        backward=partial(_backward, call),
    )
