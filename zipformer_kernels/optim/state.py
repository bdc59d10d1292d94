"""The state of ScaledAdam as it stands in ``optimizer.state`` and in checkpoints, and packed as the step
wants it.

Under each parameter stand ``exp_avg_sq`` and ``delta``, in its shape, ``param_rms`` and ``scale_exp_avg_sq``,
(), and ``scale_grads``, (size_update_period,); under the first parameter of each group also ``step``,
``num_skipped``, ``num_clipped``, ``model_norm_threshold``, (), and ``model_norms``,
(clipping_update_period,). All are tensors on the parameter's device, the moments DTensors where it is one; the
names that upstream also has mean the same there.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.call import unreadable
from zipformer_kernels.ops.scaled_adam import Statistics
from zipformer_kernels.optim.memory import check_memory
from zipformer_kernels.optim.shards import is_sharded, local, placed_like, reducer

MOMENTS = ("exp_avg_sq", "delta")


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

    def __post_init__(self) -> None:
        self._kinds = list(map(type, self.params))
        self._sharded = any(map(is_sharded, self.params))
        tensors = self.tensors()
        self._forms = [_form(p) for p in tensors]
        self.forms = [(p.dtype, p.size(), v.stride()) for p, v in zip(tensors, self.exp_avg_sq, strict=True)]
        self.dtypes = frozenset(p.dtype for p in tensors)
        self._values = _values(self.entries)
        self._watched = [local(entry[name]) for entry in self.entries for name in MOMENTS]
        self._watched += [self.entries[0][name] for name in OF_GROUP]
        self.unreadable = unreadable([self.statistics.rms, *tensors, *self._watched])
        self._watched_places = [] if self.unreadable else list(map(Tensor.data_ptr, self._watched))
        self._places = [] if self.unreadable else list(map(Tensor.data_ptr, tensors))
        self.moved = True

    def tensors(self) -> list[Tensor]:
        """The parameters, or this process's shards of them."""
        return list(map(local, self.params)) if self._sharded else self.params

    def holds(self, params: list[Tensor]) -> bool:
        """Whether this is the state of these parameters: all that it was made from is as it was, but for where
        parameters lie.
        """
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        values = _values(self.entries)
        if len(values) != len(self._values) or not all(map(is_, values, self._values)):
            return False
        if list(map(type, params)) != self._kinds:
            return False
        tensors = self.tensors()
        for p, (dtype, shape, stride) in zip(tensors, self._forms, strict=True):
            if p.dtype is not dtype or p.size() != shape or p.stride() != stride:
                return False
        if self.unreadable is not None:
            return all(p.device == self.statistics.rms.device for p in tensors)
        if list(map(Tensor.data_ptr, self._watched)) != self._watched_places:
            return False
        places = list(map(Tensor.data_ptr, tensors))
        if places != self._places:
            self._places, self.moved = places, True
            return unreadable([self.statistics.rms, *tensors]) is None
        return True


def _form(x: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return x.dtype, x.size(), x.stride()


def check_places(groups: list[tuple[Packed, list[str]]]) -> None:
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


def _values(entries: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, entries)))


def wide_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's state: float64 for float64, float32 for all others."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


@torch.inference_mode(False)
@torch.no_grad()
def gather(
    group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Any]], previous: Packed | None = None
) -> Packed:
    """Makes what is missing of a group's state, casts and moves the rest to where its parameters are, and packs it.

    Where parameters are DTensors every process must call this, with the same entries missing.

    Args:
        group: a parameter group with at least one parameter.
        state: by parameter; changed so that its small numbers are views of the packed ones.
        previous: what this group's state was packed to before, perhaps for other parameters.
    Raises:
        ValueError: the parameters are on several devices, or a moment found has not its parameter's shape.
    """
    params = group["params"]
    device = params[0].device
    for p, name in zip(params, group["param_names"], strict=True):
        if p.device != device:
            raise ValueError(f"a group must be on one device, got {p.device} for {name!r} beside {device}")
        _fill(state[p], p, name, group["size_update_period"])

    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    floats = {"dtype": dtype, "device": device}
    sizes = torch.tensor([max(p.numel(), 1) for p in params], **floats)
    single = [p.numel() == 1 for p in params]
    if any("param_rms" not in state[p] for p in params):
        for p, rms in zip(params, _root_mean_squares(group, sizes), strict=True):
            state[p].setdefault("param_rms", rms)

    def of_tensors(name: str) -> Tensor:
        packed = torch.stack([state[p][name].to(**floats) for p in params], dim=-1)
        for p, view in zip(params, packed.unbind(dim=-1), strict=True):
            state[p][name] = view
        return packed

    first = state[params[0]]
    _find_group_state(params, state, previous)
    for name, value in OF_GROUP.items():
        shape = (group["clipping_update_period"],) if name == "model_norms" else ()
        kind = {"dtype": torch.int64 if isinstance(value, int) else dtype, "device": device}
        first[name] = _own(first[name].to(**kind)) if name in first else torch.full(shape, value, **kind)
    step, skipped, clipped, norms, threshold = (first[name].detach() for name in OF_GROUP)
    statistics = Statistics(
        step=step,
        skipped=skipped,
        clipped=clipped,
        norms=norms,
        threshold=threshold,
        rms=of_tensors("param_rms"),
        scale_exp_avg_sq=of_tensors("scale_exp_avg_sq"),
        scale_grads=of_tensors("scale_grads"),
        numel=sizes,
        single=torch.tensor(single, device=device),
    )
    exp_avg_sq, delta = ([local(state[p][name]).detach() for p in params] for name in MOMENTS)
    return Packed(list(params), [state[p] for p in params], exp_avg_sq, delta, single, statistics)


def _find_group_state(
    params: list[Tensor], state: MutableMapping[Tensor, dict[str, Any]], previous: Packed | None
) -> None:
    """Puts what is of the group under its first parameter, where another one was the first before."""
    first = state[params[0]]
    others = [state[p] for p in params[1:]]
    if previous is not None and state.get(previous.params[0]) is previous.entries[0]:
        others.append(previous.entries[0])
    found = next((entries for entries in others if "step" in entries), None)
    if "step" not in first and found is not None:
        first.update({name: found.pop(name) for name in OF_GROUP if name in found})


def _root_mean_squares(group: dict[str, Any], sizes: Tensor) -> tuple[Tensor, ...]:
    """() rms of each parameter of a group, given their sizes."""
    squares = torch.stack([local(p).to(sizes.dtype).square().sum() for p in group["params"]])
    reduce = reducer(group["params"], group["param_names"])
    if reduce is not None:
        reduce(squares)
    return (squares / sizes).sqrt().unbind()


def _fill(state: dict[str, Any], p: Tensor, name: str, size_update_period: int) -> None:
    """Gives one parameter the entries that its state lacks, and those it has their dtype, device and layout."""
    dtype = wide_dtype(p)
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            continue
        found = state[moment]
        if found.shape != p.shape:
            wanted, got = tuple(found.shape), tuple(p.shape)
            raise ValueError(f"parameter {name!r} must have the shape {wanted} of its {moment}, got {got}")
        if found.is_meta and not p.is_meta:
            raise ValueError(f"{moment} of parameter {name!r} must have values, got a tensor on meta")
        found = _own(placed_like(found.to(device=p.device, dtype=dtype), p))
        if local(found).stride() != local(p).stride():
            found = torch.zeros_like(p, dtype=dtype, requires_grad=False).copy_(found)
        state[moment] = found
    if "scale_exp_avg_sq" not in state:
        state["scale_exp_avg_sq"] = torch.zeros((), dtype=dtype, device=p.device)
    if "scale_grads" not in state:
        state["scale_grads"] = torch.zeros(size_update_period, dtype=dtype, device=p.device)


def _own(x: Tensor) -> Tensor:
    """x, copied where it was made in inference mode: such a tensor cannot be written outside of it."""
    return x.clone() if x.is_inference() else x
