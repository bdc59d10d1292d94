"""What a case of an op is: named inputs for its tests, benchmarks and ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """Inputs of an op and the least work they need.

    Attributes:
        name: says which model and stack the shape comes from, or what is awkward about it.
        inputs: ``(dtype, device)`` -> the op's arguments, in the order of its schema. Floating-point tensors that a
            gradient flows to require one.
        bytes: bytes that must pass through memory, by direction (``forward``, ``backward``), for an element size in
            bytes: each input read once, each output written once.
        flops: floating-point operations, by direction.
        large: whether the case is for benchmarks only; the others run in tests as well.
        dense: bytes that code which writes down every pair of frames must hold at once, for an element size; None where
            there are no pairs.
    """

    name: str
    inputs: Callable[[torch.dtype, torch.device | str], tuple[Any, ...]]
    bytes: Callable[[int], dict[str, int]]
    flops: dict[str, int] = field(default_factory=dict)
    large: bool = False
    dense: Callable[[int], int] | None = None


def leaf(*shape: int, dtype: torch.dtype, device: torch.device | str, scale: float = 1.0) -> torch.Tensor:
    """A normally distributed tensor that requires a gradient, drawn from torch's global generator."""
    x = torch.randn(*shape, device=device, dtype=torch.float32) * scale
    return x.to(dtype).requires_grad_()
