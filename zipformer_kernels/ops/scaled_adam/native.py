"""ScaledAdam through the compiled module: what the CPU's and CUDA's steppers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.ops.scaled_adam.stepper import Stepper
from zipformer_kernels.ops.scaled_adam.table import Table, run

CHUNK_ELEMENTS = tuning.entry("scaled_adam.chunk")


def stepper_by(call: Callable[..., None], dtypes: tuple[torch.dtype, ...], real: torch.dtype) -> Stepper:
    """The stepper whose kernels `call` calls, which take `dtypes` and compute sums and the plan in `real`."""

    def launch(name: str, table: Table, loss_scale: Tensor | None, found_inf: Tensor | None) -> None:
        options = (0 if x is None else x.data_ptr() for x in (loss_scale, found_inf))
        call(f"scaled_adam_{name}", table.sums, *table.arguments(), *options)

    def step(groups, loss_scale, found_inf, reduce, tables) -> None:  # noqa: ANN001
        run(groups, reduce, loss_scale, found_inf, tables, CHUNK_ELEMENTS.value, real, launch)

    return Stepper(dtypes, step)
