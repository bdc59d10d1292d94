"""One ScaledAdam step over lists of tensors, in place: two passes over memory, and no waiting for the device.

The mathematics and the state are specified in `reference`. The other backends read p and g once for the sums of
pass 1, plan pass 2 where the sums lie, and read p, g, v, m and write p, v, m once in pass 3; on a GPU that is four
launches for any number of tensors and groups: sums over chunks, over tensors, the plan, the update.

The backend is chosen at each step, as everywhere: `zipformer_kernels.use_backend`, the environment variable, or the
best one that serves the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.op import triton_launchers
from zipformer_kernels.ops.scaled_adam import cpu, cuda, reference
from zipformer_kernels.ops.scaled_adam.reference import EARLY_ESTIMATES, Group, Hyper, Statistics
from zipformer_kernels.ops.scaled_adam.stepper import StepOp, Stepper

__all__ = ["EARLY_ESTIMATES", "Group", "Hyper", "Statistics", "step"]

CHUNK_ELEMENTS = tuning.entry("scaled_adam.eager_chunk")


def _eager_step(groups, loss_scale, found_inf, reduce, _) -> None:  # noqa: ANN001
    reference.step(groups, loss_scale, found_inf, reduce, chunk_elements=CHUNK_ELEMENTS.value)


_eager = Stepper((), _eager_step)
_op = StepOp(
    "scaled_adam", {"eager": _eager, "cpu": cpu.launchers, "cuda": cuda.launchers, **triton_launchers(__name__)}
)


def step(
    groups: Sequence[Group],
    loss_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    reduce: Callable[[Tensor], None] | None = None,
    memory: dict[Any, Any] | None = None,
) -> None:
    """Takes one step: updates parameters, moments and statistics of all groups in place, or of none.

    Args:
        groups: the groups with at least one tensor.
        loss_scale: () K, by which all gradients are too large.
        found_inf: () positive where somebody already knows that a gradient is not finite.
        reduce: adds the sums of other processes, in place, to the (3, N) sums of p^2, p g and g^2 over the tensors of
            all groups; called once, between pass 1 and pass 2. All groups are then on one device.
        memory: whatever a backend keeps from step to step of the same groups; give the same dict each time.
    Raises:
        BackendError: the backend asked for cannot take this step.
    """
    _op(groups, loss_scale, found_inf, reduce=reduce, memory=memory)
