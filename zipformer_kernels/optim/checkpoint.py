"""Optimizer checkpoints of upstream's ScaledAdam, to and fro.

Upstream stacks the parameters of a group that agree in dtype and shape, and has their state, stacked, under
the first of them: ``exp_avg_sq``, ``delta``, ``param_rms``, ``scale_exp_avg_sq`` with the stack as first
axis, ``scale_grads`` with it as second, ``step`` as an int. What belongs to the group stands under the first
parameter of the stack that comes first when stacks are sorted by (dtype's name, *shape). Source: upstream's
``optim.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zipformer_kernels.optim.packed import MOMENTS

if TYPE_CHECKING:
    from zipformer_kernels.optim.scaled_adam import ScaledAdam

_SCALE_STATE = ("param_rms", "scale_exp_avg_sq")


def is_upstream(state: dict[Any, Any]) -> bool:
    """Whether the "state" of a state dict is that of upstream's optimizer, which counts steps in Python."""
    return any(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in state.values())


def unstacked(
    state: dict[Any, dict[str, Any]], saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> dict[Any, dict[str, Tensor]]:
    """The state of upstream's ScaledAdam as ours has it, so that training goes on as it would have there.

    Args:
        state: the "state" of upstream's state dict.
        saved_groups: its "param_groups".
        groups: the parameter groups of ours, over the same parameters in the same order.
    Raises:
        ValueError: the state does not fit the parameters.
    """
    found: dict[Any, dict[str, Tensor]] = {}
    for saved_group, group in zip(saved_groups, groups, strict=True):
        indices = saved_group["params"]
        leaders = {i for i, index in enumerate(indices) if state.get(index)}
        if not leaders:
            continue  # never stepped
        stacks = _saved_stacks(group["params"], leaders)
        saved = [state.get(indices[stack[0]], {}) for stack in stacks]
        for stack, stacked in zip(stacks, saved, strict=True):
            _unstack(stack, stacked, group, indices, found)
        of_group = found[indices[0]]
        of_group["step"] = _one_step(saved)
        if "model_norms" in saved[0]:
            of_group["model_norms"] = saved[0]["model_norms"]
        if "model_norm_threshold" in saved[0]:
            of_group["model_norm_threshold"] = torch.tensor(float(saved[0]["model_norm_threshold"]))
            of_group["num_clipped"] = torch.tensor(int(saved[0].get("num_clipped", 0)))
    return found


def upstream_state_dict(optimizer: ScaledAdam) -> dict[str, Any]:
    """The state of `optimizer` as upstream's ScaledAdam saves it, for its ``load_state_dict``.

    The count of skipped steps, which upstream does not have, is left out.
    """
    ours = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    param_groups = []
    for group, saved_group in zip(optimizer.param_groups, ours["param_groups"], strict=True):
        param_groups.append({name: value for name, value in saved_group.items() if name != "param_names"})
        indices = saved_group["params"]
        if not indices or indices[0] not in ours["state"]:
            continue
        of_group = ours["state"][indices[0]]
        stacks = _stacks(group["params"])
        for stack in stacks:
            entries = [ours["state"][indices[i]] for i in stack]
            shape = group["params"][stack[0]].shape
            state[indices[stack[0]]] = {"step": int(of_group["step"]), **_stack(entries, shape)}
        leader = state[indices[stacks[0][0]]]
        if group["clipping_scale"] is not None:
            leader["model_norms"] = of_group["model_norms"].clone()
            threshold = float(of_group["model_norm_threshold"])
            if math.isfinite(threshold):
                leader["model_norm_threshold"] = threshold
                leader["num_clipped"] = int(of_group["num_clipped"])
    return {"state": state, "param_groups": param_groups}


def _stacks(params: list[Tensor], by_dtype: bool = True) -> list[list[int]]:
    """Positions of the parameters in each stack, in the order in which upstream takes the stacks."""
    stacks: dict[tuple, list[int]] = {}
    for i, p in enumerate(params):
        stacks.setdefault((str(p.dtype) if by_dtype else "", *p.shape), []).append(i)
    return [stacks[key] for key in sorted(stacks)]


def _saved_stacks(params: list[Tensor], leaders: set[int]) -> list[list[int]]:
    """The stacks of a state that stands under `leaders`: by dtype and shape, or by shape if dtypes are others now."""
    for by_dtype in (True, False):
        stacks = _stacks(params, by_dtype)
        if {stack[0] for stack in stacks} == leaders:
            return stacks
    return _stacks(params)  # whose first gap will be named


def _stack(entries: list[dict[str, Tensor]], shape: torch.Size) -> dict[str, Tensor]:
    """The state of equally shaped parameters, stacked."""
    stacked = {name: torch.stack([entry[name] for entry in entries]) for name in MOMENTS}
    if shape.numel() != 1:
        ones = [1] * len(shape)
        for name in _SCALE_STATE:
            stacked[name] = torch.stack([entry[name] for entry in entries]).reshape(-1, *ones)
        scale_grads = torch.stack([entry["scale_grads"] for entry in entries], dim=1)
        stacked["scale_grads"] = scale_grads.reshape(*scale_grads.shape, *ones)
    return stacked


def _unstack(
    stack: list[int],
    stacked: dict[str, Tensor],
    group: dict[str, Any],
    indices: list[int],
    state: dict[int, dict[str, Tensor]],
) -> None:
    """Enters the state of each parameter of a stack into `state`, by its index in the checkpoint."""
    shape = group["params"][stack[0]].shape
    wanted = (len(stack), *shape)
    for name in MOMENTS:
        if name not in stacked or stacked[name].shape != wanted:
            got = tuple(stacked[name].shape) if name in stacked else "none"
            first = group["param_names"][stack[0]]
            raise ValueError(f"state_dict must hold {name} of shape {wanted} for {first!r} and its likes, got {got}")
    for row, i in enumerate(stack):
        entry = {name: stacked[name][row] for name in MOMENTS}
        if shape.numel() > 1:  # upstream has none for one element, and NaN for an empty tensor
            missing = [name for name in (*_SCALE_STATE, "scale_grads") if name not in stacked]
            if missing:
                first = group["param_names"][stack[0]]
                raise ValueError(f"state_dict must hold {missing[0]} for {first!r} and its likes, got none")
            entry |= {name: stacked[name][row].reshape(()) for name in _SCALE_STATE}
            entry["scale_grads"] = stacked["scale_grads"][:, row].reshape(-1)
        state[indices[i]] = entry


def _one_step(saved: list[dict[str, Any]]) -> Tensor:
    steps = {int(stacked["step"]) for stacked in saved}
    if len(steps) != 1:
        raise ValueError(f"state_dict must have one step count in a group, got {sorted(steps)}")
    return torch.tensor(steps.pop())
