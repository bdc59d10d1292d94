"""Swoosh on NVIDIA GPUs: ``csrc/swoosh/cuda.cu``."""

from __future__ import annotations

from zipformer_kernels.core.launch import GPU_DTYPES, call_cuda
from zipformer_kernels.ops.swoosh.native import launchers_by

launchers = launchers_by(call_cuda, GPU_DTYPES)
