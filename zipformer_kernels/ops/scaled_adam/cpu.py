"""ScaledAdam on the CPU: ``csrc/scaled_adam/cpu.cpp``."""

from __future__ import annotations

import torch

from zipformer_kernels.core.launch import CPU_DTYPES, call_cpu
from zipformer_kernels.ops.scaled_adam.native import stepper_by

launchers = stepper_by(call_cpu, CPU_DTYPES, torch.float64)
