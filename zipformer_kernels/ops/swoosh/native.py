"""Swoosh through the compiled module: ``csrc/swoosh/cpu.cpp`` and ``csrc/swoosh/cuda.cu``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    GPU_DTYPES,
    call_cpu,
    call_cuda,
    dense,
    like,
    pointer,
    unsupported_dtype,
)
from zipformer_kernels.core.op import Launchers

KINDS = {"l": 0, "r": 1}


def _forward(call: Callable[..., None], x: Tensor, kind: str) -> tuple[Tensor]:
    x = dense(x)
    y = torch.empty_like(x)
    call("swoosh_forward", x, pointer(x), pointer(y), x.numel(), DTYPE_CODES[x.dtype], KINDS[kind])
    return (y,)


def overwrite(x: Tensor, kind: str, bias: Tensor | None) -> None:
    """Puts swoosh(x + bias) in the place of a contiguous x on the CPU; bias (channels,) of the dtype of x, or None."""
    channels = 1 if bias is None else bias.numel()
    address, codes = pointer(x), (DTYPE_CODES[x.dtype], KINDS[kind])
    call_cpu("swoosh_bias_forward", x, address, address, pointer(bias), x.numel(), channels, *codes)


def overwrite_backward(dy: Tensor, x: Tensor, kind: str, bias: Tensor | None) -> None:
    """Puts dy swoosh'(x + bias) in the place of dy and swoosh(x + bias) in that of x, as `overwrite` does."""
    channels = x.shape[-1] if x.ndim > 0 else 1
    sizes = x.numel(), channels, DTYPE_CODES[x.dtype], KINDS[kind]
    if x.numel() > 0:
        call_cpu("swoosh_bias_backward", x, *map(pointer, (dy, x, dy, x, bias)), *sizes)


def _backward(call: Callable[..., None], needs: tuple, grads: tuple, saved: tuple, x: Tensor, kind: str):
    x = dense(x)
    dy = like(grads[0], x)
    dx = torch.empty_like(x)
    call("swoosh_backward", x, *map(pointer, (dy, x, dx)), x.numel(), DTYPE_CODES[x.dtype], KINDS[kind])
    return (dx,)


def _launchers(call: Callable[..., None], dtypes: tuple[torch.dtype, ...]) -> Launchers:
    return Launchers(
        supports=lambda x, kind: unsupported_dtype(x, dtypes),
        forward=partial(_forward, call),
        backward=partial(_backward, call),
    )


cpu = _launchers(call_cpu, CPU_DTYPES)
cuda = _launchers(call_cuda, GPU_DTYPES)
