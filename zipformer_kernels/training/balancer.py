"""Balancer: nudges gradients so that each channel keeps a reasonable mean and magnitude."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.module import Module
from zipformer_kernels.training import balancer_native
from zipformer_kernels.training.randomness import being_traced, happens, number
from zipformer_kernels.training.schedule import FloatLike, ScheduledFloat

TINY = 1.0e-20  # below this a variance or mean square counts as constant and gets no gradient


class Balancer(Module):
    """The identity; on a random part of the calls its backward pushes badly behaved channels back into
    limits.

    Limits are given as the proportion of positive values and the mean absolute value of a channel; for a
    normal distribution they amount to limits on mean / stddev and on the RMS, which is what the gradient
    works on. See `balanced_gradient` for the maths, and the Zipformer paper (arXiv:2310.11230), appendix A.3.

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
        if not x.requires_grad or (being_traced() and not self.training):
            return x
        limits = self.draw()
        if limits is None:
            return x
        if x.shape[self.channel_dim] != self.num_channels:
            raise ValueError(
                f"x: wanted {self.num_channels} channels along dimension {self.channel_dim}, got {tuple(x.shape)}"
            )
        return gradient_hook(x, partial(balanced_gradient, channel_dim=self.channel_dim, **limits), x)

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

    def add(self, x: Tensor) -> None:
        """Takes in x, (rows, channels), at least one row."""
        if balancer_native.serves(x, 1):
            variance, mean = (moment.unsqueeze(0) for moment in balancer_native.moments(x, 1))
        else:
            variance, mean, _ = _moments(x.to(torch.promote_types(x.dtype, torch.float32)), [0])
        if self.rows == 0:
            self.rows, self.mean, self.variance = len(x), mean, variance
            return
        share = len(x) / (self.rows + len(x))
        difference = mean - self.mean
        self.mean = self.mean + share * difference
        self.variance = (1 - share) * (self.variance + share * difference.square()) + share * variance
        self.rows += len(x)


def balanced_gradient(
    grad: Tensor,
    x: Tensor,
    *,
    moments: Moments | None = None,
    channel_dim: int,
    min_mean: float,
    max_mean: float,
    min_rms: float,
    max_rms: float,
    grad_scale: float,
) -> Tensor:
    """The gradient of x, changed to bring each channel's mean / stddev and RMS back into their limits.

    For one channel let m = mean / stddev and r its RMS. The loss is |m - clamp(m)| + |log(clamp(r) / r)|.
    With z = (x - mean) / stddev, w = variance / r^2, and a = sign(m - clamp(m)), b = sign(clamp(r) - r), its
    gradient is

        (a - b w m) + (-a m - b w) z        (times 1 / (N stddev), a constant of the channel),

    which has RMS sqrt(level^2 + slope^2), level and slope being the two brackets. Scaled to RMS `grad_scale`
    and multiplied elementwise by |grad|, an estimate of each element's own scale, it is added to `grad`.

    Args:
        grad, x: same shape; computed in float32 (float64 for float64) and returned in the dtype of `grad`.
        moments: those of all of which x, (rows, channels), is a part; of x itself if None.
        channel_dim: the dimension of the channels; statistics are taken over all others.
        min_mean, max_mean: limits on mean / stddev.
        min_rms, max_rms: limits on the RMS.
        grad_scale: the RMS of the term that is added, relative to |grad|.
    """
    if balancer_native.serves(x, channel_dim, grad):
        known = moments and (moments.variance, moments.mean)
        limits = min_mean, max_mean, min_rms, max_rms, grad_scale
        return balancer_native.gradient(
            grad, x, *(known or balancer_native.moments(x, channel_dim)), channel_dim, limits
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    x, wide_grad = x.to(wide), grad.to(wide)
    if moments is None:
        others = [dim for dim in range(x.ndim) if dim != channel_dim % x.ndim]
        variance, mean, centred = _moments(x, others)
    else:
        variance, mean, centred = moments.variance, moments.mean, x - moments.mean
    square = variance + mean * mean
    stddev, rms = variance.clamp(min=TINY).sqrt(), square.clamp(min=TINY).sqrt()
    ratio = mean / stddev

    mean_push = (ratio - ratio.clamp(min_mean, max_mean)).sign()
    rms_push = (rms.clamp(min_rms, max_rms) - rms).sign() * (square >= TINY) * (stddev / rms).square()
    level = mean_push - rms_push * ratio
    slope = -mean_push * ratio * (variance >= TINY) - rms_push
    scale = grad_scale / (level.square() + slope.square() * (variance / stddev.square())).sqrt().clamp(min=TINY)

    direction = torch.addcmul(level * scale, centred, slope * scale / stddev)
    return torch.addcmul(wide_grad, wide_grad.abs(), direction).to(grad.dtype)


def _moments(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, by N, and mean over some dimensions, which are kept; and x - mean."""
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return variance, mean, x - mean
    mean = x.mean(dims, keepdim=True)  # torch.var_mean takes five times as long along outer dimensions
    centred = x - mean
    return centred.square().mean(dims, keepdim=True), mean, centred


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
