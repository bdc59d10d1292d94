"""swoosh_linear on the CPU: ``csrc/swoosh_linear/cpu.cpp``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    INFERENCE_DTYPES,
    call_cpu,
    contiguous,
    few_rows,
    pointer,
    unsupported_dtypes,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.swoosh_linear.native import KINDS, launchers_by


def _feed_forward(
    src: Tensor, in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, kind: str
) -> tuple[Tensor]:
    tensors = contiguous(src, in_weight, in_bias, out_weight, out_bias)
    y = torch.empty_like(tensors[0])
    if y.numel() > 0:
        hidden, channels = in_weight.shape
        sizes = {"rows": src.numel() // channels, "hidden": hidden, "kind": KINDS[kind]}
        call_cpu("feed_forward_branch", src, *map(pointer, (*tensors, y)), channels, DTYPE_CODES[src.dtype], **sizes)
    return (y,)


_for_feed_forward = Launchers(
    supports=lambda *args: unsupported_dtypes(args[:-1], INFERENCE_DTYPES),
    forward=_feed_forward,
    backward=None,
    worthwhile=lambda src, *_: few_rows(src),
)

launchers = replace(launchers_by(call_cpu, CPU_DTYPES), variants={"feed_forward": _for_feed_forward})
