"""BiasNorm on the CPU: ``csrc/bias_norm/cpu.cpp``."""

from __future__ import annotations

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import CPU_DTYPES, call_cpu
from zipformer_kernels.ops.bias_norm.native import launchers_by

PARTS = tuning.entry("bias_norm.parts")
PART_ROWS = tuning.entry("bias_norm.part_rows")

launchers = launchers_by(call_cpu, CPU_DTYPES, lambda rows: rows.groups(shortest=PART_ROWS.value, most=PARTS.value))
