"""A group's state packed as the step takes it, and whether it still is that of the group's parameters.

Kernels read and write through addresses that were entered into a table once, so what the table was made from is looked
at before every step. It is looked at block by block: what is asked of a few hundred tensors stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.call import unreadable
from zipformer_kernels.ops.scaled_adam import Statistics
from zipformer_kernels.optim.memory import check_memory
from zipformer_kernels.optim.shards import is_sharded, local

MOMENTS = ("exp_avg_sq", "delta")

OF_GROUP = {"step": 0, "num_skipped": 0, "num_clipped": 0, "model_norms": 0.0, "model_norm_threshold": math.inf}
"""What stands under the first parameter of a group alone, and its first value."""

BLOCK = tuning.entry("scaled_adam.block")

_dtype = attrgetter("dtype")


def blocks(count: int) -> Iterator[slice]:
    """Slices of at most `BLOCK` of `count` things."""
    size = BLOCK.value
    return (slice(begin, min(begin + size, count)) for begin in range(0, count, size))


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
        forms: the dtype, shape and strides that a gradient of each parameter has as a rule.
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
    forms: list[tuple[torch.dtype, torch.Size, tuple[int, ...]]] = field(init=False)
    moved: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        tensors = self.tensors()
        self.dtypes = frozenset(p.dtype for p in tensors)
        self.forms = [(p.dtype, p.size(), v.stride()) for p, v in zip(tensors, self.exp_avg_sq, strict=True)]
        state = [local(entry[name]) for entry in self.entries for name in MOMENTS]
        state += [self.entries[0][name] for name in OF_GROUP]
        self.unreadable = unreadable([self.statistics.rms, *tensors, *state])
        readable = self.unreadable is None
        self._blocks = [_Block(self.params[b], self.entries[b], readable) for b in blocks(len(self.params))]
        numbers = (self.statistics.rms, self.statistics.scale_exp_avg_sq, self.statistics.scale_grads)
        self._numbers = _Watched([*numbers, *(self.entries[0][name] for name in OF_GROUP)], readable)

    def tensors(self) -> list[Tensor]:
        """The parameters, or this process's shards of them."""
        return list(map(local, self.params)) if any(map(is_sharded, self.params)) else self.params

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether this is the state of these parameters: all that it was made from is as it was, but for where
        parameters lie.
        """
        if len(params) != len(self.params) or not all(map(is_, params, self.params)) or self._numbers.moved():
            return False
        if not all(block.holds() for block in self._blocks):
            return False
        moved = [p for block in self._blocks for p in block.moved()]
        self.moved = self.moved or len(moved) > 0
        if self.unreadable is not None:
            return all(p.device == self.statistics.rms.device for p in self.tensors())
        return len(moved) == 0 or unreadable([self.statistics.rms, *moved]) is None


class _Watched:
    """Tensors whose memory might be exchanged (``x.data = ...``). Those that cannot be read are not watched."""

    def __init__(self, tensors: Sequence[Tensor], readable: bool) -> None:
        self._tensors = tensors if readable else []
        self._places = list(map(Tensor.data_ptr, self._tensors))

    def moved(self) -> bool:
        """Whether the memory of one has been exchanged."""
        return list(map(Tensor.data_ptr, self._tensors)) != self._places


class _Block:
    """What a few parameters of a group and their state were like when it was packed."""

    def __init__(self, params: Sequence[Tensor], entries: Sequence[dict[str, Any]], readable: bool) -> None:
        self._params, self._entries, self._readable = params, entries, readable
        self._kinds = list(map(type, params))
        self._sharded = any(map(is_sharded, params))
        self._forms = self._forms_now()
        self._values = self._values_now()
        self._moments = _Watched([local(entry[name]) for entry in entries for name in MOMENTS], readable)
        self._places: list[int] = []

    def _tensors(self) -> Sequence[Tensor]:
        return list(map(local, self._params)) if self._sharded else self._params

    def _forms_now(self) -> tuple[list[Any], ...]:
        tensors = self._tensors()  # without a step of the interpreter for each, this takes half of the time
        return list(map(_dtype, tensors)), list(map(Tensor.size, tensors)), list(map(Tensor.stride, tensors))

    def _values_now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._entries)))

    def holds(self) -> bool:
        """Whether all but the places of parameters is as it was."""
        values = self._values_now()
        if len(values) != len(self._values) or not all(map(is_, values, self._values)):
            return False
        if list(map(type, self._params)) != self._kinds or self._moments.moved():
            return False
        return self._forms_now() == self._forms

    def moved(self) -> Sequence[Tensor]:
        """All the parameters, or shards, if one lies elsewhere than when this was asked last."""
        if not self._readable:
            return []
        tensors = self._tensors()
        places = list(map(Tensor.data_ptr, tensors))
        if places == self._places:
            return []
        self._places = places
        return tensors


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
