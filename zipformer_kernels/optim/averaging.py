"""Running averages of a model's weights, as icefall's recipes keep them beside the model that trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def update_averaged_model(params: Any, model_cur: nn.Module, model_avg: nn.Module) -> None:
    """Takes the current weights into an average over all of training so far.

    ::

        model_avg = (1 - w) model_avg + w model_cur,     w = average_period / batch_idx_train

    Called every `average_period` batches, with `model_avg` a copy of the model at the start, it weighs all calls alike.

    Args:
        params: has the attributes ``average_period``, the batches between calls, and ``batch_idx_train``, all batches
            so far.
        model_cur: the model that trains; a DistributedDataParallel stands for what it wraps.
        model_avg: a copy of it that is updated in place, best in float64.
    Raises:
        ValueError: the models have not the same entries.

    Source: ``update_averaged_model`` in upstream's ``utils/checkpoint.py``.
    """
    if isinstance(model_cur, nn.parallel.DistributedDataParallel):
        model_cur = model_cur.module
    average_model(model_avg, model_cur, params.average_period / params.batch_idx_train)


@torch.no_grad()
def average_model(average: nn.Module, model: nn.Module, weight: float) -> None:
    """average = (1 - weight) average + weight model, in place, for floating-point parameters and buffers.

    A constant weight makes it an exponential moving average. Entries that share memory count once; others, such as
    counters, stay as they are.

    Args:
        average: of any floating dtype and device.
        model: with the same entries.
        weight: between 0 and 1.
    Raises:
        ValueError: the models have not the same entries, or `weight` is out of range.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be between 0 and 1, got {weight}")
    averages, weights = average.state_dict(), model.state_dict()
    if averages.keys() != weights.keys():
        odd = sorted(averages.keys() ^ weights.keys())
        raise ValueError(f"average and model must have the same entries, got {', '.join(odd)} in one only")
    seen: set[tuple] = set()
    old: list[Tensor] = []
    new: list[Tensor] = []
    for name, x in averages.items():
        place = (x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape)
        if x.is_floating_point() and (place not in seen or x.numel() == 0):
            seen.add(place)
            old.append(x)
            new.append(weights[name].to(device=x.device, dtype=x.dtype))
    if old:
        torch._foreach_mul_(old, 1 - weight)
        torch._foreach_add_(old, new, alpha=weight)
