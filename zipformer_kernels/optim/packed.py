"""A group's state packed as the step takes it, and whether it still is that of the group's parameters.

Kernels read and write through addresses that were entered into a table once, so what the table was made from is looked
at before every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipformer_kernels.core.call import unreadable
from zipformer_kernels.ops.scaled_adam import Statistics
from zipformer_kernels.optim.memory import check_memory
from zipformer_kernels.optim.rows import MOMENTS, Look, rows_of
from zipformer_kernels.optim.shards import is_sharded, local

OF_GROUP = {"step": 0, "num_skipped": 0, "num_clipped": 0, "model_norms": 0.0, "model_norm_threshold": math.inf}
"""What stands under the first parameter of a group alone, and its first value."""


@dataclass(eq=False)
class Packed:
    """A group's state as the step takes it, and what it was made from.

    All tensors but the parameters are aliases of those in ``optimizer.state``: whatever becomes of those, what the step
    writes to stays.

    Attributes:
        params: the parameters.
        entries: what ``optimizer.state`` holds of each.
        exp_avg_sq, delta: of each parameter; where it is a DTensor, of this process's shard.
        single: which parameters have exactly one element.
        statistics: everything else.
        unreadable: why kernels must not take the addresses of parameters and state, or None if they may.
        dtypes: of the parameters.
        look: what was found when these were looked at last, until the step takes it.
        moved: whether parameters lie where nobody has checked yet that they may.
    """

    params: list[Tensor]
    entries: list[dict[str, Any]]
    exp_avg_sq: list[Tensor]
    delta: list[Tensor]
    single: list[bool]
    statistics: Statistics
    unreadable: str | None = field(init=False)
    dtypes: frozenset[torch.dtype] = field(init=False)
    look: Look | None = field(init=False, default=None)
    moved: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self._sharded = any(map(is_sharded, self.params))
        tensors = self.tensors()
        self.dtypes = frozenset(p.dtype for p in tensors)
        moments = [local(entry[name]) for entry in self.entries for name in MOMENTS]
        numbers = [self.entries[0][name] for name in OF_GROUP]
        self.unreadable = unreadable([self.statistics.rms, *tensors, *moments, *numbers])
        readable = self.unreadable is None
        self._numbers = numbers if readable else []
        self._places_of_numbers = list(map(Tensor.data_ptr, self._numbers))
        self._rows = rows_of(self.params, self.entries, readable)
        self._places = np.zeros(len(self.params), np.int64)

    def tensors(self) -> list[Tensor]:
        """The parameters, or this process's shards of them."""
        return list(map(local, self.params)) if self._sharded else self.params

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether this is the state of these parameters: all that it was made from is as it was, but for where
        parameters lie. If so, `look` says what was found.
        """
        if list(map(Tensor.data_ptr, self._numbers)) != self._places_of_numbers:
            return False
        self.look = self._rows.look(params if isinstance(params, list) else list(params))
        if self.look is None:
            return False
        if np.array_equal(self.look.places[0], self._places):
            return True
        self._places, self.moved = self.look.places[0], True
        return self.unreadable is not None or unreadable([self.statistics.rms, *self.tensors()]) is None

    def take_look(self) -> Look:
        """What was found when these were looked at for this step."""
        if self.look is None:  # they have just been packed
            self.holds(self.params)
        look, self.look = self.look, None
        return look


def check_places(groups: Sequence[tuple[Packed, Sequence[str]]]) -> None:
    """Checks that the parameters and moments of groups lie within their storages, and apart.

    Args:
        groups: the state and the parameters' names of each.
    Raises:
        ValueError: they do not.
    """
    labelled: list[tuple[str, Tensor]] = []
    for packed, names in groups:
        labels = [f"parameter {name!r}" for name in names]
        labelled += zip(labels, packed.tensors(), strict=True)
        for name in MOMENTS:
            labelled += zip([f"{name} of {label}" for label in labels], getattr(packed, name), strict=True)
    if labelled:
        labels, tensors = zip(*labelled, strict=True)
        check_memory(tensors, labels)
