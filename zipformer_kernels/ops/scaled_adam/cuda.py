"""ScaledAdam on NVIDIA GPUs: ``csrc/scaled_adam/cuda.cu``."""

from __future__ import annotations

import torch

from zipformer_kernels.core.launch import GPU_DTYPES, call_cuda
from zipformer_kernels.ops.scaled_adam.native import stepper_by

launchers = stepper_by(call_cuda, GPU_DTYPES, torch.float32)
