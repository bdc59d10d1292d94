"""Arguments and results of a captured call: tensors anywhere in tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def mapped(f: Callable[[Tensor], Any], x: Any) -> Any:
    """x with f of each tensor in the tensor's place, depth first."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {key: mapped(f, value) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(mapped(f, value) for value in x))
    if isinstance(x, (tuple, list)):
        return type(x)(mapped(f, value) for value in x)
    return x


def tensors_of(x: Any) -> list[Tensor]:
    """All tensors in x, depth first."""
    found: list[Tensor] = []
    mapped(found.append, x)
    return found


def form(x: Any) -> Hashable:
    """What a capture of a call with x depends on: shapes, dtypes and devices of tensors, and all else by its value.

    Raises:
        TypeError: something in x is no tensor and not hashable.
    """
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    if isinstance(x, dict):
        return dict, tuple((key, form(value)) for key, value in x.items())
    if isinstance(x, (tuple, list)):
        return type(x), tuple(map(form, x))
    try:
        hash(x)
    except TypeError:
        raise TypeError(f"arguments must be tensors or hashable, got a {type(x).__name__}") from None
    return type(x), x


def check_devices(x: Any, device: torch.device) -> None:
    """Raises ValueError where a tensor lies elsewhere: a capture would keep the numbers that it had."""
    for i, tensor in enumerate(tensors_of(x)):
        if tensor.device != device:
            raise ValueError(f"all tensors must be on {device} to be captured, got tensor {i} on {tensor.device}")


@torch.inference_mode(False)
@torch.no_grad()
def buffers_like(x: Any) -> Any:
    """x with a tensor of its own in each tensor's place, of the same numbers."""
    return mapped(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), x)


@torch.no_grad()
def fill(buffers: list[Tensor], tensors: list[Tensor]) -> None:
    """Copies tensors into buffers of the same forms."""
    for buffer, tensor in zip(buffers, tensors, strict=True):
        buffer.copy_(tensor)
