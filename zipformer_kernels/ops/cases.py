"""What a case of an op is: named inputs for its tests, benchmarks and ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from zipformer_kernels.presets import preset

FRAMES, BATCH = 1500, 30  # into an encoder: 30 recordings of 30 s


@dataclass(frozen=True)
class Case:
    """Inputs of an op and the least work they need.

    Attributes:
        name: says which model and stack the shape comes from, or what is awkward about it.
        inputs: ``(dtype, device)`` -> the op's arguments, in the order of its schema. Floating-point tensors that a
            gradient flows to require one.
        bytes: bytes that must pass through memory, by direction (``forward``, ``backward``), for an element size in
            bytes: each input read once, each output written once. Variants without gradients have no ``backward``.
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


@dataclass(frozen=True)
class Stack:
    """The sizes of one stack of a preset on `BATCH` recordings of 30 s.

    Attributes:
        name: for cases, such as ``L stack 0, 30 x 30 s``; stacks are counted from 0, as in the model.
        downsampling: how many of the encoder's frames are one of the stack's.
        frames: T.
        channels: of the layer's input.
        hidden: of the second feed-forward.
        heads: of the attention.
        kernel: taps of the convolutions.
    """

    name: str
    downsampling: int
    frames: int
    channels: int
    hidden: int
    heads: int
    kernel: int


def stacks(name: str) -> list[Stack]:
    """The stacks of a preset. The last two have the shapes of the third and the second."""
    sizes = preset(name)
    keys = "downsampling_factor", "encoder_dim", "feedforward_dim", "num_heads", "cnn_module_kernel"
    return [
        Stack(f"{name} stack {i}, {BATCH} x 30 s", factor, -(-FRAMES // factor), *rest)
        for i, (factor, *rest) in enumerate(zip(*(sizes[key] for key in keys), strict=True))
    ]


def normal(*shape: int, dtype: torch.dtype, device: torch.device | str, scale: float = 1.0) -> torch.Tensor:
    """A normally distributed tensor, drawn from torch's global generator."""
    return (torch.randn(shape, device=device, dtype=torch.float32) * scale).to(dtype)


def leaf(*shape: int, dtype: torch.dtype, device: torch.device | str, scale: float = 1.0) -> torch.Tensor:
    """A tensor as of `normal` that requires a gradient."""
    return normal(*shape, dtype=dtype, device=device, scale=scale).requires_grad_()


def linear(
    out_channels: int, in_channels: int, bias: bool = True, *, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight of a linear layer, whose results have the size of its inputs, and its bias or None."""
    weight = normal(out_channels, in_channels, dtype=dtype, device=device, scale=in_channels**-0.5)
    return weight, normal(out_channels, dtype=dtype, device=device) if bias else None


def linear_elements(out_channels: int, in_channels: int) -> int:
    """How many elements the weight and the bias of a linear layer have."""
    return out_channels * (in_channels + 1)
