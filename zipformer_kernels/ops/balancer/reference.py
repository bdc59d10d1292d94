"""The Balancer's gradient in plain PyTorch: the specification every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1.0e-20  # below this a variance or mean square counts as constant and gets no gradient
LEAST = 1.0e-37  # of what a root is taken of: at zero it has no derivative, and gradients of gradients would be NaN


def balanced_gradient(
    grad: Tensor,
    x: Tensor,
    variance: Tensor | None,
    mean: Tensor | None,
    channel_dim: int,
    min_mean: float,
    max_mean: float,
    min_rms: float,
    max_rms: float,
    grad_scale: float,
) -> Tensor:
    """grad + |grad| times the direction that brings channels of x back into their limits; see the package's docstring.

    Computed in float32 (float64 for float64) and returned in the dtype of `grad`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, wide_grad = x.to(wide), grad.to(wide)
    if variance is None or mean is None:
        variance, mean, centred = _moments(x, channel_dim)
    else:
        variance, mean = (moment.view(_by_channel(x, channel_dim)) for moment in (variance, mean))
        centred = x - mean
    square = variance + mean * mean
    stddev, rms = variance.clamp(min=TINY).sqrt(), square.clamp(min=TINY).sqrt()
    ratio = mean / stddev

    mean_push = (ratio - ratio.clamp(min_mean, max_mean)).sign()
    rms_push = (rms.clamp(min_rms, max_rms) - rms).sign() * (square >= TINY) * (stddev / rms).square()
    level = mean_push - rms_push * ratio
    slope = -mean_push * ratio * (variance >= TINY) - rms_push
    norm_square = level.square() + slope.square() * (variance / stddev.square())
    scale = grad_scale / norm_square.clamp(min=LEAST).sqrt()

    direction = torch.addcmul(level * scale, centred, slope * scale / stddev)
    return torch.addcmul(wide_grad, wide_grad.abs(), direction).to(grad.dtype)


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Variance, by N, and mean of each channel, (channels,), in float32 (float64 for float64)."""
    variance, mean, _ = _moments(x.to(torch.promote_types(x.dtype, torch.float32)), channel_dim)
    return variance.flatten(), mean.flatten()


def _moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Variance and mean, of size 1 along all dimensions but that of the channels; and x - mean."""
    dims = [dim for dim in range(x.ndim) if dim != channel_dim % x.ndim]
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return variance, mean, x - mean
    mean = x.mean(dims, keepdim=True)  # torch.var_mean takes five times as long along outer dimensions
    centred = x - mean
    return centred.square().mean(dims, keepdim=True), mean, centred


def _by_channel(x: Tensor, channel_dim: int) -> list[int]:
    """The shape of one number for each channel, which broadcasts to x."""
    return [size if dim == channel_dim % x.ndim else 1 for dim, size in enumerate(x.shape)]
