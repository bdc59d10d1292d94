"""conv_module on NVIDIA GPUs: ``csrc/conv_module/cuda.cu``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import GPU_DTYPES, call_cuda, multiprocessors
from zipformer_kernels.ops.conv_module.arguments import Arguments, unsupported
from zipformer_kernels.ops.conv_module.native import launchers_by

BLOCKS_PER_MULTIPROCESSOR = tuning.entry("conv_module.cuda_blocks")
WIDEST = {False: 127, True: 47}  # kernels whose strips fit into the shared memory of every GPU; in chunks


def _unsupported(a: Tensor, s: Tensor, weight: Tensor, *rest: Any) -> str | None:
    widest = WIDEST[rest[1] is not None]
    if weight.shape[2] > widest:
        return f"it takes kernels of up to {widest} frames, got {weight.shape[2]}"
    return unsupported(GPU_DTYPES, a, s, weight, *rest)


def _blocks(arguments: Arguments) -> int:
    """One group of frames for each block."""
    return BLOCKS_PER_MULTIPROCESSOR.value * multiprocessors(arguments.a)


launchers = launchers_by(call_cuda, _unsupported, _blocks, beside=False)
