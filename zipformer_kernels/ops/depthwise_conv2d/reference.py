"""depthwise_conv2d in plain PyTorch: what every backend is tested against, and what exporters trace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of every channel with its own taps, padded to x's size: (batch, channels, T, frequencies)."""
    if x.numel() == 0:  # convolutions of nothing are errors
        return x.clone()
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    """As `depthwise_conv2d`, with the strides that `torch.empty_like` gives to x."""
    return (torch.empty_like(x).copy_(depthwise_conv2d(x, weight, bias)),)
