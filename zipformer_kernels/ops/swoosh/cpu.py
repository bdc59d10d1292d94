"""Swoosh on the CPU: ``csrc/swoosh/cpu.cpp``."""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.core.launch import CPU_DTYPES, DTYPE_CODES, call_cpu, contiguous, pointer
from zipformer_kernels.ops.swoosh.native import KINDS, launchers_by


def overwrite(x: Tensor, kind: str, bias: Tensor | None) -> None:
    """Puts swoosh(x + bias) in the place of a contiguous x on the CPU; bias (channels,) of the dtype of x, or None."""
    (bias,) = contiguous(bias)
    channels = 1 if bias is None else bias.numel()
    address, codes = pointer(x), (DTYPE_CODES[x.dtype], KINDS[kind])
    call_cpu("swoosh_bias_forward", x, address, address, pointer(bias), x.numel(), channels, *codes)


def overwrite_backward(dy: Tensor, x: Tensor, kind: str, bias: Tensor | None) -> None:
    """Puts dy swoosh'(x + bias) in the place of dy and swoosh(x + bias) in that of x, as `overwrite` does."""
    (bias,) = contiguous(bias)
    channels = x.shape[-1] if x.ndim > 0 else 1
    sizes = x.numel(), channels, DTYPE_CODES[x.dtype], KINDS[kind]
    if x.numel() > 0:
        call_cpu("swoosh_bias_backward", x, *map(pointer, (dy, x, dy, x, bias)), *sizes)


launchers = launchers_by(call_cpu, CPU_DTYPES)
