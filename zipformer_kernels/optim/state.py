"""The state of ScaledAdam as it stands in ``optimizer.state`` and in checkpoints, and packed as the step
wants it.

Under each parameter stand ``exp_avg_sq`` and ``delta``, in its shape, ``param_rms`` and ``scale_exp_avg_sq``,
(), and ``scale_grads``, (size_update_period,); under the first parameter of each group also ``step``,
``num_skipped``, ``num_clipped``, ``model_norm_threshold``, (), and ``model_norms``,
(clipping_update_period,). All are tensors on the parameter's device; the names that upstream also has mean
the same there.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.ops.scaled_adam import Statistics

MOMENTS = ("exp_avg_sq", "delta")

Packed = tuple[list[Tensor], list[Tensor], Statistics]


def wide_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's state: float64 for float64, float32 for all others."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def gather(group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Any]]) -> Packed:
    """Makes what is missing of a group's state, and packs its small numbers.

    Args:
        group: a parameter group with at least one parameter.
        state: by parameter; changed so that its small numbers are views of the packed ones.
    Returns:
        exp_avg_sq and delta of each parameter, and the statistics of the group.
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

    def of_group(name: str, fresh: Tensor) -> Tensor:
        first[name] = first[name].to(fresh) if name in first else fresh
        return first[name]

    def of_tensors(name: str) -> Tensor:
        packed = torch.stack([state[p][name].to(**floats) for p in params], dim=-1)
        for p, view in zip(params, packed.unbind(dim=-1), strict=True):
            state[p][name] = view
        return packed

    sizes = [p.numel() for p in params]
    statistics = Statistics(
        step=of_group("step", torch.zeros((), **counts)),
        skipped=of_group("num_skipped", torch.zeros((), **counts)),
        clipped=of_group("num_clipped", torch.zeros((), **counts)),
        norms=of_group("model_norms", torch.zeros(group["clipping_update_period"], **floats)),
        threshold=of_group("model_norm_threshold", torch.full((), math.inf, **floats)),
        rms=of_tensors("param_rms"),
        scale_exp_avg_sq=of_tensors("scale_exp_avg_sq"),
        scale_grads=of_tensors("scale_grads"),
        numel=torch.tensor([max(size, 1) for size in sizes], **floats),
        single=torch.tensor([size == 1 for size in sizes], device=device),
    )
    moments = [[state[p][name] for p in params] for name in MOMENTS]
    return *moments, statistics


def _fill(state: dict[str, Any], p: Tensor, name: str, size_update_period: int) -> None:
    """Gives one parameter the entries that its state lacks, and those it has their dtype and device."""
    dtype = wide_dtype(p)
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(p, dtype=dtype)
        if state[moment].shape != p.shape:
            wanted, got = tuple(p.shape), tuple(state[moment].shape)
            raise ValueError(f"{moment} of parameter {name!r} must have shape {wanted}, got {got}")
        state[moment] = state[moment].to(device=p.device, dtype=dtype)
    if "param_rms" not in state:
        state["param_rms"] = (p.to(dtype).square().sum() / max(p.numel(), 1)).sqrt()
    if "scale_exp_avg_sq" not in state:
        state["scale_exp_avg_sq"] = torch.zeros((), dtype=dtype, device=p.device)
    if "scale_grads" not in state:
        state["scale_grads"] = torch.zeros(size_update_period, dtype=dtype, device=p.device)
