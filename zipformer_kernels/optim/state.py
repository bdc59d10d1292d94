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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.ops.scaled_adam import Statistics
from zipformer_kernels.optim.shards import local, placed_like, reducer

MOMENTS = ("exp_avg_sq", "delta")


@dataclass(eq=False)
class Packed:
    """A group's state as the step takes it.

    Attributes:
        exp_avg_sq, delta: of each parameter; where it is a DTensor, of this process's shard.
        single: which parameters have exactly one element.
        statistics: everything else.
    """

    exp_avg_sq: list[Tensor]
    delta: list[Tensor]
    single: list[bool]
    statistics: Statistics


def wide_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's state: float64 for float64, float32 for all others."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def gather(group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Any]]) -> Packed:
    """Makes what is missing of a group's state, and packs its small numbers.

    Where parameters are DTensors every process must call this, with the same entries missing.

    Args:
        group: a parameter group with at least one parameter.
        state: by parameter; changed so that its small numbers are views of the packed ones.
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
    first = state[params[0]]
    counts = {"dtype": torch.int64, "device": device}
    floats = {"dtype": dtype, "device": device}
    sizes = torch.tensor([max(p.numel(), 1) for p in params], **floats)
    single = [p.numel() == 1 for p in params]
    if any("param_rms" not in state[p] for p in params):
        for p, rms in zip(params, _root_mean_squares(group, sizes), strict=True):
            state[p].setdefault("param_rms", rms)

    def of_group(name: str, fresh: Tensor) -> Tensor:
        first[name] = first[name].to(fresh) if name in first else fresh
        return first[name]

    def of_tensors(name: str) -> Tensor:
        packed = torch.stack([state[p][name].to(**floats) for p in params], dim=-1)
        for p, view in zip(params, packed.unbind(dim=-1), strict=True):
            state[p][name] = view
        return packed

    statistics = Statistics(
        step=of_group("step", torch.zeros((), **counts)),
        skipped=of_group("num_skipped", torch.zeros((), **counts)),
        clipped=of_group("num_clipped", torch.zeros((), **counts)),
        norms=of_group("model_norms", torch.zeros(group["clipping_update_period"], **floats)),
        threshold=of_group("model_norm_threshold", torch.full((), math.inf, **floats)),
        rms=of_tensors("param_rms"),
        scale_exp_avg_sq=of_tensors("scale_exp_avg_sq"),
        scale_grads=of_tensors("scale_grads"),
        numel=sizes,
        single=torch.tensor(single, device=device),
    )
    exp_avg_sq, delta = ([local(state[p][name]) for p in params] for name in MOMENTS)
    return Packed(exp_avg_sq, delta, single, statistics)


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
            state[moment] = torch.zeros_like(p, dtype=dtype)
            continue
        if state[moment].shape != p.shape:
            wanted, got = tuple(p.shape), tuple(state[moment].shape)
            raise ValueError(f"{moment} of parameter {name!r} must have shape {wanted}, got {got}")
        found = placed_like(state[moment].to(device=p.device, dtype=dtype), p)
        if local(found).stride() != local(p).stride():
            found = torch.zeros_like(p, dtype=dtype).copy_(found)
        state[moment] = found
    if "scale_exp_avg_sq" not in state:
        state["scale_exp_avg_sq"] = torch.zeros((), dtype=dtype, device=p.device)
    if "scale_grads" not in state:
        state["scale_grads"] = torch.zeros(size_update_period, dtype=dtype, device=p.device)
