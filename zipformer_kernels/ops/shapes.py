"""The checks of arguments that ops share: shapes, and masks."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(**wanted: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first argument whose shape is not the one beside it; None has any shape."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def as_mask(name: str, mask: Tensor | None) -> Tensor | None:
    """A padding mask as bools: True where it is True, or an integer other than 0, as upstream takes it.

    Raises:
        TypeError: it is no tensor of bools or integers. Numbers to add to scores, as some attention takes them, would
            mean the reverse.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        return mask
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a tensor of bools or integers, got {got}")
    return mask != 0
