"""The check of arguments that have a shape each."""

from __future__ import annotations

from torch import Tensor


def check_shapes(**wanted: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first argument whose shape is not the one beside it; None has any shape."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
