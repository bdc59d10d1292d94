"""The Eden learning-rate schedules, over batches and epochs.

Source: ``Eden``, ``Eden2`` in upstream's ``optim.py``; section 3.5 of the Zipformer paper (arXiv:2310.11230).
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)


class _BatchAndEpochSchedule(LRScheduler):
    """A schedule of batches and epochs that each count, or are told, their own number.

    Attributes:
        batch: batches so far, over all epochs.
        epoch: epochs so far.
        base_lrs: learning rate of each group that the schedule scales: "base_lr" of the group if it has one,
            else its "lr" when the schedule was made.
    """

    def __init__(self, optimizer: Optimizer, warmup_batches: float, warmup_start: float, verbose: bool) -> None:
        # Not torch's constructor, which takes a first step: until step_batch or step_epoch the rates stay as
        # given.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not 0.0 <= warmup_start <= 1.0:
            raise ValueError(f"warmup_start must be in [0, 1], got {warmup_start}")
        self.optimizer = optimizer
        self.warmup_batches = warmup_batches
        self.warmup_start = warmup_start
        self.verbose = verbose
        self.batch = 0
        self.epoch = 0
        self.base_lrs: list[float] = []
        self._adopt_groups()
        self._last_lr = [float(group["lr"]) for group in optimizer.param_groups]

    def decay(self) -> float:
        """The factor on the base rates at the present batch and epoch, before warm-up."""
        raise NotImplementedError

    def get_lr(self) -> list[float]:
        """The learning rate of each group at the present batch and epoch."""
        warmup = 1.0
        if self.batch < self.warmup_batches:
            warmup = self.warmup_start + (1.0 - self.warmup_start) * (self.batch / self.warmup_batches)
        decay = self.decay()
        return [base_lr * decay * warmup for base_lr in self.base_lrs]

    def get_last_lr(self) -> list[float]:
        """The learning rates last set; before that, those the optimizer was made with."""
        return self._last_lr

    def step_batch(self, batch: int | None = None) -> None:
        """Counts one batch, or takes `batch`, counted over all epochs, and sets the learning rates."""
        self.batch = self.batch + 1 if batch is None else batch
        self._set_lrs()

    def step_epoch(self, epoch: int | None = None) -> None:
        """Counts one epoch, after it; or takes `epoch`, before it; and sets the learning rates."""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        self._set_lrs()

    def step(self, batch: int | None = None) -> None:
        """`step_batch`, under the name by which training frameworks call schedules once a batch."""
        self.step_batch(batch)

    def state_dict(self) -> dict[str, Any]:
        """The numbers of batches and epochs; not the base rates, so that they can change on resuming."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes "epoch" and "batch" from `state_dict`; the learning rates are set at the next step."""
        for name in ("epoch", "batch"):
            if name not in state_dict:
                raise ValueError(f"state_dict must hold 'epoch' and 'batch', got the keys {sorted(state_dict)}")
        self.epoch, self.batch = state_dict["epoch"], state_dict["batch"]

    def _adopt_groups(self) -> None:
        """Notes the base rates of groups added since the last time."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(group.setdefault("base_lr", float(group["lr"])))

    def _set_lrs(self) -> None:
        self._adopt_groups()
        self._last_lr = self.get_lr()
        for i, (group, lr) in enumerate(zip(self.optimizer.param_groups, self._last_lr, strict=True)):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if self.verbose:
                logger.info("epoch %s, batch %s: learning rate of group %d is %.4e", self.epoch, self.batch, i, lr)


class Eden(_BatchAndEpochSchedule):
    """Falls as the inverse square root of batches and of epochs, once there have been many of them::

        lr = base_lr ((b^2 + B^2) / B^2)^(-1/4) ((e^2 + E^2) / E^2)^(-1/4) warmup(b)
        warmup rises linearly from warmup_start at b = 0 to 1 at b = warmup_batches

    with b, e the batches and epochs so far, B = `lr_batches`, E = `lr_epochs`. "Epochs" may be any measure of
    the data seen, such as hours.

    Args:
        optimizer: whose learning rates to set. A rate that is a tensor is filled in place.
        lr_batches: batches after which the rate starts to fall; recipes have 5000 to 7500.
        lr_epochs: epochs after which the rate starts to fall; recipes have 3.5 to 6.
        warmup_batches: length of the warm-up, in batches.
        warmup_start: factor at the start of the warm-up, in [0, 1].
        verbose: log every change.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        ValueError: `warmup_start` is not in [0, 1].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_batches: float,
        lr_epochs: float,
        warmup_batches: float = 500.0,
        warmup_start: float = 0.5,
        verbose: bool = False,
    ) -> None:
        super().__init__(optimizer, warmup_batches, warmup_start, verbose)
        self.lr_batches = lr_batches
        self.lr_epochs = lr_epochs

    def decay(self) -> float:
        return _decay(self.batch, self.lr_batches, -0.25) * _decay(self.epoch, self.lr_epochs, -0.25)


class Eden2(_BatchAndEpochSchedule):
    """Eden without epochs: falls as the inverse of batches, once there have been many of them::

        lr = base_lr ((b^2 + B^2) / B^2)^(-1/2) warmup(b)

    Arguments and errors as for `Eden`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_batches: float,
        warmup_batches: float = 500.0,
        warmup_start: float = 0.5,
        verbose: bool = False,
    ) -> None:
        super().__init__(optimizer, warmup_batches, warmup_start, verbose)
        self.lr_batches = lr_batches

    def decay(self) -> float:
        return _decay(self.batch, self.lr_batches, -0.5)


def _decay(count: float, scale: float, power: float) -> float:
    return ((count**2 + scale**2) / scale**2) ** power
