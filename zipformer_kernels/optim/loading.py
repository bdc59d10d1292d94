"""What `ScaledAdam.load_state_dict` is given, in the order and the form of the optimizer that takes it.

A state dict has no parameters, only their places, so one saved in another order of parameters of equal shapes would go
unseen to the wrong ones: names decide where both sides have them. Upstream's state is taken apart
(`zipformer_kernels.optim.checkpoint`), and shapes that do not fit are refused before anything changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zipformer_kernels.optim.checkpoint import is_upstream, unstacked
from zipformer_kernels.optim.packed import MOMENTS

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that come and go with what a model is wrapped in."""


def fitted(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict for an optimizer of these parameter groups, with its parameters in their order.

    Args:
        state_dict: of a `ScaledAdam`, ours or upstream's.
        groups: the optimizer's parameter groups.
    Raises:
        ValueError: it is not such a state, or does not fit the parameters.
    """
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(f"state_dict must hold 'state' and 'param_groups', got the keys {sorted(state_dict)}")
    saved_groups = _in_order(state_dict["param_groups"], groups)
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if saved_sizes != sizes:
        raise ValueError(f"state_dict must have parameter groups of sizes {sizes}, got {saved_sizes}")
    state = state_dict["state"]
    if is_upstream(state):
        state = unstacked(state, saved_groups, groups)
    for saved, group in zip(saved_groups, groups, strict=True):
        for index, p, name in zip(saved["params"], group["params"], group["param_names"], strict=True):
            entry = state.get(index)
            if not entry:
                continue  # never stepped
            for moment in MOMENTS:
                if moment not in entry:
                    raise ValueError(f"state_dict must hold {moment} for {name!r}, got the keys {sorted(entry)}")
                if entry[moment].shape != p.shape:
                    wanted, got = tuple(p.shape), tuple(entry[moment].shape)
                    raise ValueError(f"state_dict must hold {moment} of shape {wanted} for {name!r}, got {got}")
    return {**state_dict, "state": state, "param_groups": saved_groups}


def _in_order(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups as `groups` lie, parameter by parameter, where names tell; else as they are."""
    saved_names, names = _names(saved_groups), _names(groups)
    if saved_names is None or names is None or saved_names == names or len(saved_groups) != len(groups):
        return saved_groups
    places = {name: (k, i) for k, of_group in enumerate(saved_names) for i, name in enumerate(of_group)}
    empty = iter([saved for saved in saved_groups if not saved["params"]])
    ordered = []
    for number, (group, wanted) in enumerate(zip(groups, names, strict=True)):
        for name in wanted:
            if name not in places:
                raise ValueError(
                    f"state_dict must have a parameter {name!r}, got {_some(places)} "
                    "(without 'param_names' in its groups their order decides)"
                )
        homes = {places[name][0] for name in wanted}
        sizes = [len(saved_names[k]) for k in sorted(homes)]
        if wanted and sizes != [len(wanted)]:
            raise ValueError(
                f"state_dict must have the {len(wanted)} parameters of group {number} in a group of their own, "
                f"got them in groups of sizes {sizes}"
            )
        saved = saved_groups[homes.pop()] if wanted else next(empty, {"params": []})
        indices = [saved["params"][places[name][1]] for name in wanted]
        ordered.append({**saved, "params": indices, "param_names": group["param_names"]})
    return ordered


def _names(groups: list[dict[str, Any]]) -> list[list[str]] | None:
    """The names of all parameters, without what a model is wrapped in; None where they do not tell them apart."""
    names = []
    for number, group in enumerate(groups):
        of_group = list(group.get("param_names", ()))
        made_up = [f"{number}.{i}" for i in range(len(of_group))]
        # Indices that are no numbers are names themselves, and torch.distributed.checkpoint has gone by them.
        if len(of_group) != len(group["params"]) or (of_group and of_group == made_up):
            return None
        if any(isinstance(index, str) for index in group["params"]):
            return None
        names.append([".".join(part for part in name.split(".") if part not in WRAPPERS) for name in of_group])
    flat = [name for of_group in names for name in of_group]
    return names if len(set(flat)) == len(flat) else None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
