"""Balancer: nudges gradients so that each channel keeps a reasonable mean and magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.module import Module
from zipformer_kernels.ops.balancer import balanced_gradient, channel_moments
from zipformer_kernels.training.randomness import being_traced, happens, number
from zipformer_kernels.training.schedule import FloatLike, ScheduledFloat


class Balancer(Module):
    """The identity; on a random part of the calls its backward pushes badly behaved channels back into
    limits.

    Limits are given as the proportion of positive values and the mean absolute value of a channel; for a
    normal distribution they amount to limits on mean / stddev and on the RMS, which is what the gradient
    works on. See `zipformer_kernels.ops.balancer` for the maths, and the Zipformer paper (arXiv:2310.11230),
    appendix A.3.

    As in upstream it acts whenever x requires a gradient, in eval mode too. Unlike upstream it never skips
    itself because much GPU memory is allocated, which would make a run depend on what else the process holds.

    Args:
        num_channels: the size of x along `channel_dim`.
        channel_dim: which dimension of x holds the channels; may be negative.
        min_positive, max_positive: limits on the proportion of positive values of a channel.
        min_abs, max_abs: limits on the mean absolute value of a channel.
        grad_scale: the RMS of the added gradient, relative to the gradient that arrives.
        prob: the probability of acting on a call; one draw of Python's ``random`` a call. By default 0.5 at
            the start of training, 0.125 from batch 8000 on.
    """

    def __init__(
        self,
        num_channels: int,
        channel_dim: int,
        min_positive: FloatLike = 0.05,
        max_positive: FloatLike = 0.95,
        min_abs: FloatLike = 0.2,
        max_abs: FloatLike = 100.0,
        grad_scale: FloatLike = 0.04,
        prob: FloatLike | None = None,
    ) -> None:
        super().__init__()
        if prob is None:
            prob = ScheduledFloat((0.0, 0.5), (8000.0, 0.125), default=0.4)
        self.prob = prob
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.min_positive = min_positive
        self.max_positive = max_positive
        self.min_abs = min_abs
        self.max_abs = max_abs
        self.grad_scale = grad_scale

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, of any shape with `num_channels` along `channel_dim`."""
        change = self.change(x.requires_grad, x.shape[self.channel_dim], self.channel_dim)
        return x if change is None else gradient_hook(x, change, x)

    def change(self, wanted: bool, channels: int, channel_dim: int = -1) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Draws whether to act: ``(gradient, x)`` -> the gradient of x, or None.

        Args:
            wanted: whether x requires a gradient.
            channels: how many x has.
            channel_dim: along which dimension.
        """
        if not wanted or (not self.training and being_traced()):
            return None
        limits = self.draw()
        if limits is None:
            return None
        if channels != self.num_channels:
            raise ValueError(f"x: wanted {self.num_channels} channels along dimension {channel_dim}, got {channels}")
        return partial(balanced_gradient, channel_dim=channel_dim, **limits)

    def draw(self) -> dict[str, float] | None:
        """Draws whether to act on a call: the limits as `balanced_gradient` takes them, or None."""
        if not happens(number(self.prob)):
            return None
        return {
            "min_mean": _proportion_to_mean(number(self.min_positive)),
            "max_mean": _proportion_to_mean(number(self.max_positive)),
            "min_rms": _abs_to_rms(number(self.min_abs)),
            "max_rms": _abs_to_rms(number(self.max_abs)),
            "grad_scale": number(self.grad_scale),
        }


class Moments:
    """Mean and variance of each channel, in float32 (float64 for float64), of rows that come in parts.

    Parts are merged with the formula of Chan, Golub and LeVeque (1979), which does not cancel.
    """

    def __init__(self) -> None:
        self.rows = 0

    @property
    def known(self) -> tuple[Tensor, Tensor]:
        """Variance and mean, (channels,), of at least one row."""
        return self.variance, self.mean

    def add(self, x: Tensor) -> None:
        """Takes in x, (rows, channels), at least one row."""
        variance, mean = channel_moments(x, 1)
        if self.rows == 0:
            self.rows, self.mean, self.variance = len(x), mean, variance
            return
        share = len(x) / (self.rows + len(x))
        difference = mean - self.mean
        self.mean = self.mean + share * difference
        self.variance = (1 - share) * (self.variance + share * difference.square()) + share * variance
        self.rows += len(x)


def _abs_to_rms(mean_abs: float) -> float:
    """The RMS of a zero-mean normal variable of the given mean absolute value: sqrt(pi / 2) times that."""
    return 1.25331413732 * mean_abs


def _proportion_to_mean(proportion: float) -> float:
    """About the mean / stddev at which a normal variable is positive that often: 0.814 atanh(2 proportion -
    1).

    Crude in the tails; upstream's constants, which every trained model has seen.
    """
    x = 2 * proportion - 1
    epsilon = 1.0e-10  # keeps proportions 0 and 1 finite
    return 0.8139535143 * (math.log(1 + x + epsilon) - math.log(1 - x + epsilon)) / 2.0
