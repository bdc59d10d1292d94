"""ScaledAdam through the compiled module: ``csrc/scaled_adam/cpu.cpp`` and ``csrc/scaled_adam/cuda.cu``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zipformer_kernels.core.launch import CPU_DTYPES, GPU_DTYPES, call_cpu, call_cuda
from zipformer_kernels.ops.scaled_adam.stepper import Stepper
from zipformer_kernels.ops.scaled_adam.table import Table, run

CHUNK_ELEMENTS = 2**14  # a block's or thread's share: long enough to pay, short enough to share out small models


def _stepper(call: Callable[..., None], dtypes: tuple[torch.dtype, ...], real: torch.dtype) -> Stepper:
    def launch(name: str, table: Table, loss_scale: Tensor | None, found_inf: Tensor | None) -> None:
        options = (0 if x is None else x.data_ptr() for x in (loss_scale, found_inf))
        call(f"scaled_adam_{name}", table.sums, *table.arguments(), *options)

    def step(groups, loss_scale, found_inf, reduce, tables) -> None:  # noqa: ANN001
        run(groups, reduce, loss_scale, found_inf, tables, CHUNK_ELEMENTS, real, launch)

    return Stepper(dtypes, step)


cpu = _stepper(call_cpu, CPU_DTYPES, torch.float64)
cuda = _stepper(call_cuda, GPU_DTYPES, torch.float32)
