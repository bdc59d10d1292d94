"""Changing the frame rate between the stacks of the U-Net."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from zipformer_kernels.branch.plain import made_of
from zipformer_kernels.branch.ways import only_computes
from zipformer_kernels.core.call import being_traced
from zipformer_kernels.core.module import Module
from zipformer_kernels.ops.downsample import downsample
from zipformer_kernels.training import FloatLike


@made_of(parameters=("bias",))
class SimpleDownsample(Module):
    """A weighted mean of every `downsample` frames, the weights a softmax over one learned number per place.

    A length that `downsample` does not divide is filled up by repeating the last frame.

    Args:
        channels: accepted as upstream has it; any number of channels works.
        downsample: how many frames become one.
        dropout, causal: accepted as upstream has them; they change nothing.
    """

    def __init__(self, channels: int, downsample: int, dropout: FloatLike, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.bias = nn.Parameter(torch.zeros(downsample))
        self.name: str | None = None  # written by the training loop, for logs
        self.dropout = copy.deepcopy(dropout)
        self.downsample = downsample

    def forward(self, src: Tensor) -> Tensor:
        """From (T, batch, channels) to (ceil(T / downsample), batch, channels)."""
        if only_computes(src, self.bias) and src.shape[0] > 0:
            return self._infer(src)
        if not being_traced():
            return downsample(src, self.bias)
        frames, factor = src.shape[0], self.downsample
        length = (frames + factor - 1) // factor  # a program for every length must not depend on what is missing
        src = src.index_select(0, torch.arange(length * factor, device=src.device).clamp(max=frames - 1))
        weights = self.bias.softmax(dim=0).reshape(-1, 1, 1)
        return (src.reshape(length, factor, *src.shape[1:]) * weights).sum(dim=1)

    def _infer(self, src: Tensor) -> Tensor:
        """`forward` without a product for every frame: one place of all groups after the other."""
        first, *weights = self.bias.softmax(dim=0).tolist()
        result = src[:: self.downsample] * first
        for place, weight in enumerate(weights, start=1):
            part = src[place :: self.downsample]
            result[: len(part)].add_(part, alpha=weight)
            result[len(part) :].add_(src[-1:], alpha=weight)
        return result


@made_of()
class SimpleUpsample(Module):
    """Repeats every frame `upsample` times.

    Args:
        num_channels: accepted as upstream has it; any number of channels works.
        upsample: how many frames one becomes.
    """

    def __init__(self, num_channels: int, upsample: int) -> None:
        super().__init__()
        self.upsample = upsample

    def forward(self, src: Tensor) -> Tensor:
        """From (T, batch, channels) to (T * upsample, batch, channels)."""
        if being_traced():
            return src.index_select(0, torch.arange(src.shape[0] * self.upsample, device=src.device) // self.upsample)
        return src.unsqueeze(1).expand(-1, self.upsample, -1, -1).flatten(0, 1)
