"""BiasNorm on the CPU: ``csrc/bias_norm/cpu.cpp``."""

from __future__ import annotations

from zipformer_kernels.core.launch import CPU_DTYPES, call_cpu
from zipformer_kernels.ops.bias_norm.native import launchers_by

# So many groups that threads share them out evenly, but each long enough that adding up the groups costs little.
launchers = launchers_by(call_cpu, CPU_DTYPES, lambda rows: rows.groups(shortest=64, most=128))
