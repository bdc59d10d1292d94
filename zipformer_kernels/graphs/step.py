"""A training step as a CUDA graph: forward, backward and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zipformer_kernels.graphs.capture import (
    Cache,
    CudaGraphs,
    Graphs,
    Run,
    Watched,
    blamed,
    own_casts,
    surroundings,
)
from zipformer_kernels.graphs.structure import buffers_like, check_devices, fill, form, tensors_of
from zipformer_kernels.optim import ScaledAdam
from zipformer_kernels.training import Balancer, ScheduledFloat, Whiten, without_draws

LEFT_OUT = {
    Whiten: "the host reads its metric, and Python draws whether it acts",
    Balancer: "Python draws whether it acts",
}


@dataclass
class _Step:
    """One form of batches: called for the first times, captured then."""

    buffers: Any
    calls: int = 0
    since: int = 0
    replay: Run | None = None
    rates: list[float] = field(default_factory=list)
    state: list[Any] = field(default_factory=list)


class GraphedStep:
    """A training step (forward, backward, the optimizer's step) that is the replay of a CUDA graph.

    ::

        step = GraphedStep(model, lambda model, x, lengths: model(x, lengths)[0].square().mean(), optimizer)
        loss = step(x, lengths)  # takes one step, and never waits for the device

    Of each form of batches the first two calls take their steps by Python, the second of them refusing whatever would
    wait for the device. The third captures, and from then on calls replay. Every call takes exactly one step.

    Python decides nothing in a replay, so the step runs within `training.without_draws`: what Python's ``random`` would
    decide does not happen (`left_out` names the modules whose work that is). Dropout and the skipping of sequences are
    drawn on the device, anew in each replay. Rates that follow a schedule are those of the capture: after `hold` calls
    it is looked whether ``batch_count`` has moved one, and if so the step is captured again.

    Learning rates are moved to the device (``group["lr"]`` becomes a tensor), so that schedulers go on working. Other
    options of the optimizer are those of the capture. Parameters, buffers, modules or a state of the optimizer that are
    exchanged lead to a new capture.

    Args:
        model: in training mode, on one device.
        loss: ``(model, *batch)`` -> a scalar. Autocast belongs in there, or around the call.
        optimizer: a `ScaledAdam`, or one of torch's made with ``capturable=True``. No GradScaler is supported.
        cache: of how many forms of batches captures are kept.
        hold: for how many calls a capture is used before schedules are looked at.
        graphs: what captures; by default ``torch.cuda.graph``. Where it does not serve the device, as on a CPU, every
            step is taken by Python, in the same way.
    Attributes:
        captures: how many captures there have been.
        left_out: names of modules, and why what they do is left out of the step.
    Raises:
        ValueError: the optimizer cannot be captured; `cache` or `hold` is less than 1; in a call, a tensor of the batch
            is not on the model's device.
        CaptureError: in a call, the step does what no graph can hold. The message names the module and the line.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        optimizer: Optimizer,
        *,
        cache: int = 4,
        hold: int = 500,
        graphs: Graphs | None = None,
    ) -> None:
        if hold < 1:
            raise ValueError(f"hold must be at least 1, got {hold}")
        self.model, self.loss, self.optimizer, self.hold = model, loss, optimizer, hold
        self.captures = 0
        self.left_out = {
            name: reason
            for name, module in model.named_modules()
            for kind, reason in LEFT_OUT.items()
            if isinstance(module, kind)
        }
        self._graphs = CudaGraphs() if graphs is None else graphs
        self._device = next(model.parameters()).device
        self._cache = Cache(cache)
        self._watched: Watched | None = None
        self._schedules = [module for module in model.modules() if isinstance(module, ScheduledFloat)]
        _check_capturable(optimizer)
        self._rates = [_on_device(group["lr"], self._device) for group in optimizer.param_groups]
        self._put_rates()

    def __call__(self, *batch: Any) -> Tensor:
        """Takes one step, and returns the loss before it."""
        check_devices(batch, self._device)
        self._put_rates()
        if self._watched is None or not self._watched.same():
            self.clear()
            self._watched = Watched(self.model)
        if not self._graphs.serves(self._device):
            return self._run(batch)
        step = self._step_for(batch)
        fill(tensors_of(step.buffers), tensors_of(batch))
        step.calls += 1
        if step.calls == 1:
            return self._graphs.rehearse(lambda: self._run(step.buffers), strict=False)
        with blamed(self.model, "this step"):
            if step.calls == 2:
                return self._graphs.rehearse(lambda: self._run(step.buffers), strict=True)
            if step.replay is None:
                step.replay = self._graphs.record(lambda: self._run(step.buffers))
                step.rates, step.state = self._scheduled(), self._state()
                self.captures += 1
        step.since += 1
        return step.replay().clone()

    def clear(self) -> None:
        """Drops all captures, and their memory."""
        self._cache.entries.clear()
        self._watched = None

    def _step_for(self, batch: Any) -> _Step:
        """What there is for a batch of this form; made anew where rates or the optimizer's state are others."""
        key = (form(batch), *surroundings(self._device))
        step = self._cache.get(key)
        if step is not None and step.replay is not None:
            state = self._state()
            if len(state) != len(step.state) or not all(map(is_, state, step.state)):
                step = None
            elif step.since >= self.hold:
                step.since = 0
                step = step if step.rates == self._scheduled() else None
        if step is None:
            step = _Step(buffers_like(batch))
            self._cache.put(key, step)
        return step

    def _run(self, batch: Any) -> Tensor:
        """The step. Gradients are made anew, in a capture in its own memory."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad(), without_draws(), own_casts():
            value = self.loss(self.model, *batch)
            value.backward()
        self.optimizer.step()
        return value.detach()

    def _scheduled(self) -> list[float]:
        with without_draws():
            return list(map(float, self._schedules))

    def _state(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.optimizer.state.values())))

    def _put_rates(self) -> None:
        """Moves learning rates that somebody has set to where the kernels read them."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate


def _on_device(lr: float | Tensor, device: torch.device) -> Tensor:
    return torch.full((), float(lr), dtype=torch.float32, device=device)


def _check_capturable(optimizer: Optimizer) -> None:
    if isinstance(optimizer, ScaledAdam):
        return
    for i, group in enumerate(optimizer.param_groups):
        if not group.get("capturable", False):
            name = type(optimizer).__name__
            raise ValueError(f"optimizer must be made with capturable=True, got a {name} without it in group {i}")
