"""BiasNorm on NVIDIA GPUs: ``csrc/bias_norm/cuda.cu``."""

from __future__ import annotations

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import GPU_DTYPES, call_cuda, multiprocessors
from zipformer_kernels.ops.bias_norm.native import launchers_by
from zipformer_kernels.ops.bias_norm.rows import Rows

BLOCKS_PER_MULTIPROCESSOR = tuning.entry("bias_norm.cuda_blocks")


def _blocks(rows: Rows) -> int:
    """One group of rows for each block."""
    return rows.groups(shortest=1, most=BLOCKS_PER_MULTIPROCESSOR.value * multiprocessors(rows.x))


launchers = launchers_by(call_cuda, GPU_DTYPES, _blocks)
