"""A Conformer of Zipformer-L's size, to hold it against: torchaudio's where it is installed, else a plain one.

Source: Gulati et al., arXiv:2005.08100; 12 layers, 512 channels, 8 heads, kernel 31, subsampled by 4, as in the
Zipformer paper's comparison. The plain one has no relative positions, which makes it faster, not slower.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

CHANNELS, HEADS, HIDDEN, LAYERS, KERNEL = 512, 8, 2048, 12, 31
BINS = 80


class FeedForward(nn.Sequential):
    """Half a feed-forward step, without the residual."""

    def __init__(self) -> None:
        super().__init__(
            nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, HIDDEN), nn.SiLU(), nn.Dropout(0.1), nn.Linear(HIDDEN, CHANNELS)
        )


class Convolution(nn.Module):
    """The convolution module on (batch, T, channels), without the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.gate = nn.Conv1d(CHANNELS, 2 * CHANNELS, 1)
        self.depthwise = nn.Conv1d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2, groups=CHANNELS)
        self.batch_norm = nn.BatchNorm1d(CHANNELS)
        self.out = nn.Conv1d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.glu(self.gate(self.norm(x).transpose(1, 2)), dim=1)
        return self.out(nn.functional.silu(self.batch_norm(self.depthwise(x)))).transpose(1, 2)


class Layer(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FeedForward(), FeedForward()
        self.norm, self.out_norm = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.projection, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.convolution = Convolution()

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        x = x + self.attention(x)
        x = x + self.convolution(x)
        return self.out_norm(x + 0.5 * self.second(x))


class Conformer(nn.Module):
    """From features (batch, T, 80) of full length to (batch, about T / 4, 512)."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.subsampling = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, stride=2), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2), nn.ReLU()
        )
        self.linear = nn.Linear(CHANNELS * (((BINS - 1) // 2 - 1) // 2), CHANNELS)
        self.layers = layers

    def forward(self, features: Tensor) -> Tensor:
        x = self.linear(self.subsampling(features.unsqueeze(1)).transpose(1, 2).flatten(2))
        if isinstance(self.layers, nn.Sequential):
            return self.layers(x)
        return self.layers(x, torch.full((x.shape[0],), x.shape[1], device=x.device))[0]


def conformer_l() -> Conformer:
    """The Conformer-L with fresh weights."""
    if importlib.util.find_spec("torchaudio") is not None:
        from torchaudio.models import Conformer as Layers

        return Conformer(Layers(CHANNELS, HEADS, HIDDEN, LAYERS, KERNEL, dropout=0.1))
    return Conformer(nn.Sequential(*(Layer() for _ in range(LAYERS))))
