"""The conv embed: from filterbank frames to half as many frames of the encoder's channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels.branch.plain import Expected, When, convolution, made_of, plain_parts, sequential
from zipformer_kernels.core import tuning
from zipformer_kernels.core.call import being_traced, has_values
from zipformer_kernels.core.module import Module
from zipformer_kernels.modules.bias_norm import BiasNorm
from zipformer_kernels.modules.convnext import ConvNeXt, channels_last
from zipformer_kernels.modules.swoosh import SwooshR
from zipformer_kernels.ops.shapes import check_lengths
from zipformer_kernels.ops.sizes import compact, of_every_size
from zipformer_kernels.ops.swoosh import swoosh_
from zipformer_kernels.presets import FBANK_BINS, preset
from zipformer_kernels.training import Balancer, Dropout3, FloatLike, ScaleGrad, ScheduledFloat, Whiten

MIN_FRAMES = 9  # three unpadded 3 x 3 convolutions, one of stride 2 in time, leave (T - 7) // 2 frames
TILE = tuning.entry("conv_embed.frames")


def _conv(stride: tuple[int, int], padding: tuple[int, int]) -> Expected:
    return convolution(nn.Conv2d, kernel_size=(3, 3), stride=stride, padding=padding, dilation=(1, 1), groups=1)


_layers = sequential(
    *(_conv((1, 1), (0, 1)), ScaleGrad, Balancer, SwooshR),
    *(_conv((2, 2), (0, 0)), Balancer, SwooshR),
    *(_conv((1, 2), (0, 0)), Balancer, SwooshR),
)


@made_of(conv=_layers, convnext=ConvNeXt, out=nn.Linear)
class Conv2dSubsampling(Module):
    """Three convolutions, one ConvNeXt block, a linear layer and a BiasNorm: T frames become (T - 7) // 2.

    Args:
        in_channels: filterbank bins, at least 7.
        out_channels: channels of the result.
        layer1_channels, layer2_channels, layer3_channels: channels of the three convolutions.
        dropout: dropout on the result, with a mask shared over time.

    Raises:
        ValueError: fewer than 7 `in_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layer1_channels: int = 8,
        layer2_channels: int = 32,
        layer3_channels: int = 128,
        dropout: FloatLike = 0.1,
    ) -> None:
        super().__init__()
        if in_channels < 7:
            raise ValueError(f"in_channels must be at least 7, got {in_channels}")
        self.conv = nn.Sequential(
            nn.Conv2d(1, layer1_channels, kernel_size=3, padding=(0, 1)),  # (time, frequency)
            ScaleGrad(0.2),
            Balancer(layer1_channels, channel_dim=1, max_abs=1.0),
            SwooshR(),
            nn.Conv2d(layer1_channels, layer2_channels, kernel_size=3, stride=2),
            Balancer(layer2_channels, channel_dim=1, max_abs=4.0),
            SwooshR(),
            nn.Conv2d(layer2_channels, layer3_channels, kernel_size=3, stride=(1, 2)),
            Balancer(layer3_channels, channel_dim=1, max_abs=4.0),
            SwooshR(),
        )
        self.convnext = ConvNeXt(layer3_channels, kernel_size=(7, 7))
        self.in_channels: int | None = in_channels  # None in a converted model: upstream keeps only the width
        self.out_width = _width(in_channels)
        self.layer3_channels = layer3_channels
        self.out = nn.Linear(self.out_width * layer3_channels, out_channels)
        # There is only one, so its gradient can afford a larger scale than that of those in the layers.
        self.out_whiten = Whiten(
            num_groups=1,
            whitening_limit=ScheduledFloat((0.0, 4.0), (20000.0, 8.0), default=4.0),
            prob=(0.025, 0.25),
            grad_scale=0.02,
        )
        self.out_norm = BiasNorm(out_channels)
        self.dropout = Dropout3(dropout, shared_dim=1)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Conv2dSubsampling:
        """The conv embed for `Zipformer.from_preset(name)`, with fresh weights, from 80 filterbank bins.

        Args:
            name: "S", "M", "L" or "XL".
            **overrides: other arguments of `Conv2dSubsampling`, in place of the preset's.

        Raises:
            ValueError: there is no such preset.
        """
        arguments = {
            "in_channels": FBANK_BINS,
            "out_channels": preset(name)["encoder_dim"][0],
            "dropout": ScheduledFloat((0.0, 0.3), (20000.0, 0.1)),
        }
        return cls(**{**arguments, **overrides})

    @of_every_size
    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds whole sequences.

        Args:
            x: (batch, T, in_channels), T at least 9.
            x_lens: (batch,), the frames of each sequence before padding; the longest must fill x. That is
                checked where it costs no wait, for lengths on the CPU.

        Returns:
            (batch, (T - 7) // 2, out_channels), and the lengths (batch,).

        Raises:
            ValueError: a shape or the longest length does not fit.
            TypeError: x_lens is no tensor.
        """
        self._check_input(x, x_lens, MIN_FRAMES)
        if self._goes_in_tiles(x):
            x = self._projected_tiles(x)
        elif channels_last(x) and "out" in plain_parts(self, When.ANY):
            x = self._projected(self._features(x), self._channels_last_weight())
        else:
            x = self.out(_flatten_frequencies(self._features(x)))
        x = self.dropout(self.out_norm(self.out_whiten(x)))
        return x, _checked_lengths((x_lens - 7) // 2, x)

    @of_every_size
    def streaming_forward(self, x: Tensor, x_lens: Tensor, cached_left_pad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeds one chunk of a batch of streams; P is ``convnext.padding[0]``, 3.

        Args:
            x: (batch, T, in_channels); the next chunk starts 2 ((T - 7) // 2 - P) frames later.
            x_lens: (batch,), the frames of each sequence before padding; as for `forward`.
            cached_left_pad: from `get_init_states` or the last chunk.

        Returns:
            (batch, (T - 7) // 2 - P, out_channels), the lengths (batch,), and the next `cached_left_pad`.

        Raises:
            ValueError: a shape or the longest length does not fit.
            TypeError: x_lens is no tensor.
        """
        pad = self.convnext.padding[0]
        self._check_input(x, x_lens, MIN_FRAMES + 2 * pad)
        x, cached_left_pad = self.convnext.streaming_forward(self.conv(x.unsqueeze(1)), cached_left_pad)
        x = self.out_norm(self.out(_flatten_frequencies(x)))
        return x, _checked_lengths((x_lens - 7) // 2 - pad, x), cached_left_pad

    def get_init_states(self, batch_size: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """`cached_left_pad` before the first chunk: zeros (batch, layer3_channels, P, frequencies)."""
        shape = (batch_size, self.layer3_channels, self.convnext.padding[0], self.out_width)
        return torch.zeros(shape, dtype=self.out.weight.dtype, device=device)

    def _features(self, x: Tensor) -> Tensor:
        """From (batch, T, in_channels) to (batch, layer3_channels, (T - 7) // 2, out_width)."""
        image = x.contiguous().unsqueeze(3).permute(0, 3, 1, 2) if channels_last(x) else x.unsqueeze(1)
        return self.convnext(self.conv(image))

    def _inferred_features(self, x: Tensor) -> Tensor:
        """`_features` without gradients: activations overwrite what the convolutions before them made."""
        image = x.contiguous().unsqueeze(3).permute(0, 3, 1, 2)
        for layer in self.conv:
            if isinstance(layer, SwooshR):
                swoosh_(image.permute(0, 2, 3, 1), "r")
            else:
                image = layer(image)
        return self.convnext(image)

    def _projected(self, features: Tensor, weight: Tensor) -> Tensor:
        """The linear layer on `_features` whose channels lie last in memory; `weight` as `_channels_last_weight`."""
        return F.linear(features.permute(0, 2, 3, 1).flatten(2), weight, self.out.bias)

    def _channels_last_weight(self) -> Tensor:
        """The weight of the linear layer for inputs of (frequencies, channels) in place of the reverse."""
        return self.out.weight.unflatten(1, (self.layer3_channels, self.out_width)).transpose(1, 2).flatten(1)

    def _goes_in_tiles(self, x: Tensor) -> bool:
        """Whether nothing but speed and memory depends on how many frames the layers see at a time."""
        if not channels_last(x) or x.shape[0] == 0 or self.training:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False
        return plain_parts(self, When.INFERENCE) == {"conv", "convnext", "out"}

    def _projected_tiles(self, x: Tensor) -> Tensor:
        """The linear layer's result, of a tile of frames at a time, with the frames that the ConvNeXt block sees."""
        batch, frames = x.shape[0], (x.shape[1] - 7) // 2
        reach = self.convnext.padding[0]
        weight = self._channels_last_weight()
        y = None
        for sequences, begin, end in _tiles(batch, frames):
            first, last = max(begin - reach, 0), min(end + reach, frames)
            features = self._inferred_features(x[sequences, 2 * first : 2 * last + 7])
            tile = self._projected(features[:, :, begin - first : end - first], weight)
            if y is None:
                y = tile.new_empty(batch, frames, tile.shape[2])
            y[sequences, begin:end] = tile
        return y

    def _check_input(self, x: Tensor, x_lens: Tensor, min_frames: int) -> None:
        fits = x.ndim == 3 and x.shape[1] >= min_frames and _width(x.shape[2]) == self.out_width
        if not fits or self.in_channels not in (None, x.shape[2]):
            bins = self.in_channels or f"{4 * self.out_width + 3} to {4 * self.out_width + 6} bins"
            raise ValueError(
                f"x: wanted (batch, frames, {bins}) with at least {min_frames} frames, got {tuple(x.shape)}"
            )
        check_lengths(x_lens, x.shape[0])


def _tiles(batch: int, frames: int) -> Iterator[tuple[slice, int, int]]:
    """Sequences, first frame and last frame + 1 of the tiles: several short sequences, or a part of a long one."""
    tile = TILE.value
    sequences, parts = max(tile // frames, 1), -(-frames // tile)
    for first in range(0, batch, sequences):
        for part in range(parts):
            yield slice(first, first + sequences), frames * part // parts, frames * (part + 1) // parts


def _width(bins: int) -> int:
    """How many frequencies the three convolutions leave."""
    return ((bins - 1) // 2 - 1) // 2


def _flatten_frequencies(x: Tensor) -> Tensor:
    """From (batch, channels, T, frequencies) to (batch, T, channels * frequencies)."""
    return compact(x.transpose(1, 2)).flatten(2)


def _checked_lengths(lengths: Tensor, x: Tensor) -> Tensor:
    # Asked first whether the call is recorded: to look at how many lengths there are would fix the batch size.
    looks = not being_traced() and lengths.device.type == "cpu" and has_values(lengths)
    if looks and len(lengths) > 0 and lengths.max() != x.shape[1]:
        raise ValueError(
            f"x_lens: wanted the longest sequence to fill x, got {int(lengths.max())} output frames for it "
            f"and {x.shape[1]} for x"
        )
    return lengths
