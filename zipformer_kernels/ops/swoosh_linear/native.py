"""swoosh_linear through the compiled module: ``cpu.cpp`` and ``cuda.cu`` of ``csrc/swoosh_linear/``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    GPU_DTYPES,
    INFERENCE_DTYPES,
    as_empty_like,
    call_cpu,
    call_cuda,
    contiguous,
    few_rows,
    pointer,
    unsupported_dtypes,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.swoosh_linear.layout import layout
from zipformer_kernels.ops.swoosh_linear.product import around_product, unsupported

KINDS = {"l": 0, "r": 1}


def _activate(call: Callable[..., None], x: Tensor, mask: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    a = torch.empty_like(x, dtype=dtype)
    mask, *sizes = layout(x, mask)
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[dtype], KINDS[kind]
    call("swoosh_linear_forward", x, *map(pointer, (x, mask, a)), *sizes, *codes)
    return a


def _differentiate(
    call: Callable[..., None], da: Tensor, x: Tensor, mask: Tensor | None, kind: str, with_a: bool
) -> tuple[Tensor, Tensor | None]:
    given, x = x, x.contiguous()
    dx = torch.empty_like(x)
    a = torch.empty_like(da) if with_a else None
    mask, *sizes = layout(x, mask)
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[da.dtype], KINDS[kind]
    call("swoosh_linear_backward", x, *map(pointer, (da, x, mask, dx, a)), *sizes, *codes)
    return as_empty_like(dx, given), a


def _infer(
    src: Tensor, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, kind: str
) -> tuple[Tensor]:
    tensors = contiguous(src, in_weight, in_bias, out_weight, out_bias)
    y = torch.empty_like(tensors[0])
    if y.numel() > 0:
        hidden, channels = in_weight.shape
        dtype = DTYPE_CODES[src.dtype]
        sizes = {"rows": src.numel() // channels, "hidden": hidden, "kind": KINDS[kind]}
        call_cpu("feed_forward_branch", src, *map(pointer, (*tensors, y)), channels, dtype, **sizes)
    return (y,)


def _launchers(call: Callable[..., None], dtypes: tuple[torch.dtype, ...]) -> Launchers:
    return around_product(partial(_activate, call), partial(_differentiate, call), partial(unsupported, dtypes))


cpu = _launchers(call_cpu, CPU_DTYPES)
cpu_infer = Launchers(
    supports=lambda *args: unsupported_dtypes(args[:-1], INFERENCE_DTYPES),
    forward=_infer,
    backward=None,
    worthwhile=lambda src, *_: few_rows(src),
)
cuda = _launchers(call_cuda, GPU_DTYPES)
