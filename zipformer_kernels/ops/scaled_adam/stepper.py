"""What a backend of the optimizer step is, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.call import WATCHERS, watcher
from zipformer_kernels.core.op import Op
from zipformer_kernels.ops.scaled_adam.reference import Group

Reduce = Callable[[Tensor], None]


@dataclass(frozen=True)
class Stepper:
    """One backend of the step.

    Attributes:
        dtypes: of the parameters and gradients that it takes.
        step: ``(groups, loss_scale, found_inf, reduce, memory)``, see `zipformer_kernels.ops.scaled_adam.step`.
    """

    dtypes: tuple[torch.dtype, ...]
    step: Callable[[Sequence[Group], Tensor | None, Tensor | None, Reduce | None, dict], None]

    def supports(self, groups: Sequence[Group]) -> str | None:
        """Why this backend cannot take a step of these groups, or None if it can."""
        devices = {group.statistics.rms.device for group in groups}
        if len(devices) > 1:
            return f"it takes tensors on one device, got {', '.join(sorted(map(str, devices)))}"
        for group in groups:
            if group.unreadable is not None:
                return group.unreadable
        found = set().union(*(group.dtypes for group in groups))
        for dtype in sorted(found.difference(self.dtypes), key=str):
            wanted = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"it takes {wanted}, got {dtype}"
        return None


class StepOp:
    """The optimizer step as an op: what chooses its backend. It mutates, so it is no `library.Op`.

    Attributes:
        name: for messages.
        backends: steppers by backend name; ``eager`` among them.
        variants: none.
    """

    def __init__(self, name: str, steppers: dict[str, Stepper]) -> None:
        self.name = name
        self.backends = steppers
        self.variants: dict[str, Op] = {}

    def unsupported(self, name: str, groups: Sequence[Group]) -> str | None:
        """Why backend `name` cannot take a step of these groups, or None if it can."""
        if name not in self.backends:
            return backends.missing[name] or f"{self.name} has no {name} kernels"
        if name == "eager":
            return None
        watched_by = watcher()
        if watched_by in WATCHERS:
            return WATCHERS[watched_by]
        device = groups[0].statistics.rms.device.type
        return backends.unserved_device(name, device) or self.backends[name].supports(groups)

    def select(self, backend: str | None, groups: Sequence[Group]) -> str:
        """The name of the backend that steps these groups. Raises `BackendError`."""
        request = backends.requested(backend)
        device = groups[0].statistics.rms.device.type
        if request == "auto":
            names = backends.PREFERENCE.get(device, ("eager",))
        else:
            names = backends.asked_for(backend, request, self.backends)
        reasons = []
        for name in names:
            reason = self.unsupported(name, groups)
            if reason is None:
                return name
            reasons.append(f"backend {name!r} cannot serve this call: {reason}")
        raise backends.BackendError(f"{self.name}: {'; '.join(reasons)}")

    explain: Callable[..., str] = Op.explain

    def __call__(
        self,
        groups: Sequence[Group],
        loss_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        reduce: Reduce | None = None,
        memory: dict[Any, Any] | None = None,
    ) -> None:
        """Takes a step; see `zipformer_kernels.ops.scaled_adam.step`."""
        name = self.select(None, groups)
        self.backends[name].step(groups, loss_scale, found_inf, reduce, {} if memory is None else memory)
