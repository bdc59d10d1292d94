"""Parameters spread over processes: DTensors, as `fully_shard` and tensor parallelism make them.

Each process steps its own shards. All that it needs of the others are sums over whole tensors: three numbers each,
added up by one all-reduce of them all (one per sharded dimension of the device mesh, and per mesh).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor: what `local` of it is not all there is."""
    module = sys.modules.get("torch.distributed.tensor")  # DTensors there are, if any, are its
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """This process's part of x. Without grad mode."""
    return x.to_local() if is_sharded(x) else x


def placed_like(x: Tensor, p: Tensor) -> Tensor:
    """x, of the shape of p, spread over processes as p is. Every process must hold the same x."""
    if not is_sharded(p):
        return x.full_tensor() if is_sharded(x) else x
    if not is_sharded(x):
        from torch.distributed.tensor import DTensor, Replicate

        x = DTensor.from_local(x, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    if x.device_mesh == p.device_mesh and x.placements == p.placements:
        return x
    return x.redistribute(p.device_mesh, p.placements)


def reducer(params: Sequence[Tensor], names: Sequence[str]) -> Callable[[Tensor], None] | None:
    """What adds up sums over shards, or None where no parameter has shards.

    Args:
        params: all parameters of a step, in the same order in every process.
        names: theirs, for messages.
    Returns:
        A function that takes a tensor whose last axis is as long as `params`, holding sums over this process's shards,
        and makes them sums over whole tensors, in place.
    Raises:
        ValueError: a parameter is a sum over processes (`Partial`): there is no one tensor to step.
    """
    columns: dict[tuple[Any, int], list[int]] = {}
    for i, (p, name) in enumerate(zip(params, names, strict=True)):
        for dim, placement in enumerate(p.placements) if is_sharded(p) else ():
            if placement.is_partial():
                raise ValueError(f"parameters must be sharded or replicated, got {placement} for {name!r}")
            if not placement.is_replicate():
                columns.setdefault((p.device_mesh, dim), []).append(i)
    if not columns:
        return None
    device = local(params[0]).device
    parts = [(mesh.get_group(dim), torch.tensor(indices, device=device)) for (mesh, dim), indices in columns.items()]

    def reduce(sums: Tensor) -> None:
        for group, indices in parts:
            part = sums.index_select(-1, indices)
            torch.distributed.all_reduce(part, group=group)
            sums.index_copy_(-1, indices, part)

    return reduce
