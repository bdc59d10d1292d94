"""The state of ScaledAdam as it stands in ``optimizer.state`` and in checkpoints, and packed as the step
wants it.

Under each parameter stand ``exp_avg_sq`` and ``delta``, in its shape, ``param_rms`` and ``scale_exp_avg_sq``,
(), and ``scale_grads``, (size_update_period,); under the first parameter of each group also ``step``,
``num_skipped``, ``num_clipped``, ``model_norm_threshold``, (), and ``model_norms``,
(clipping_update_period,). All are tensors on the parameter's device, the moments DTensors where it is one; the
names that upstream also has mean the same there.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.ops.scaled_adam import Statistics
from zipformer_kernels.optim.memory import check_within
from zipformer_kernels.optim.packed import MOMENTS, OF_GROUP, Packed
from zipformer_kernels.optim.shards import local, placed_like, reducer


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
    check_within(local(p), f"parameter {name!r}")
    for key, value in state.items():
        if isinstance(value, Tensor):
            check_within(local(value), f"{key} of parameter {name!r}")
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
