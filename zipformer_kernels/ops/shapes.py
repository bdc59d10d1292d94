"""The checks of arguments that ops and models share: shapes, lengths, and masks."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(**wanted: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first argument whose shape is not the one beside it; None has any shape."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_lengths(x_lens: Tensor, batch: int) -> None:
    """Raises TypeError unless `x_lens` is a tensor, ValueError unless it is (batch,)."""
    if not isinstance(x_lens, Tensor):
        raise TypeError(f"x_lens: wanted a tensor of {batch} lengths, got {type(x_lens).__name__}")
    if x_lens.shape != (batch,):
        raise ValueError(f"x_lens: wanted one length for each of {batch} sequences, got {tuple(x_lens.shape)}")


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
