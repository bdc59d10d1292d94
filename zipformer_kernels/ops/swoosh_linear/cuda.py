"""swoosh_linear on NVIDIA GPUs: ``csrc/swoosh_linear/cuda.cu``."""

from __future__ import annotations

from zipformer_kernels.core.launch import GPU_DTYPES, call_cuda
from zipformer_kernels.ops.swoosh_linear.native import launchers_by

launchers = launchers_by(call_cuda, GPU_DTYPES)
