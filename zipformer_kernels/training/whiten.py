"""Whiten: nudges gradients so that no few directions dominate the covariance of the features."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.call import has_values
from zipformer_kernels.core.module import Module
from zipformer_kernels.training.randomness import being_traced, happens, logging_draw, number
from zipformer_kernels.training.schedule import FloatLike, ScheduledFloat

logger = logging.getLogger(__name__)

TINY = 1.0e-20  # keeps the quotients finite where the features, or the gradient, are all zero


def whitening_schedule(limit: float, ratio: float = 2.0) -> ScheduledFloat:
    """The recipe's schedule for `whitening_limit`: from `limit` to `ratio * limit` over 20000 batches."""
    return ScheduledFloat((0.0, limit), (20000.0, ratio * limit), default=limit)


class Whiten(Module):
    """The identity; on a random part of the calls its backward pushes the features towards a white
    covariance.

    With C the covariance of the features in their groups, the metric is mean(eigenvalues^2) /
    mean(eigenvalues)^2: 1 for perfectly white features. While it is over `whitening_limit`, its gradient,
    scaled to `grad_scale` times the norm of the gradient that arrives, is added, and the module acts with
    probability `max_prob`; under the limit nothing is added and it looks only with `min_prob`. See the
    Zipformer paper (arXiv:2310.11230), appendix A.4.

    As in upstream it acts whenever x requires a gradient, in eval mode too. Reading the metric to choose the
    probability makes the host wait for the device, on the calls where it acts.

    Args:
        num_groups: how many groups of channels are whitened separately, with one common variance.
        whitening_limit: the metric from which the gradient is changed, at least 1.
        prob: the probability of acting on a call, or (min_prob, max_prob).
        grad_scale: the norm of the added gradient relative to the arriving one.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        num_groups: int,
        whitening_limit: FloatLike,
        prob: float | tuple[float, float],
        grad_scale: FloatLike,
    ) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        if float(whitening_limit) < 1:
            raise ValueError(f"whitening_limit must be at least 1, got {float(whitening_limit)}")
        if float(grad_scale) < 0:
            raise ValueError(f"grad_scale must not be negative, got {float(grad_scale)}")
        self.num_groups = num_groups
        self.whitening_limit = whitening_limit
        self.grad_scale = grad_scale
        self.min_prob, self.max_prob = (prob, prob) if isinstance(prob, float) else prob
        if not 0 < self.min_prob <= self.max_prob <= 1:
            raise ValueError(f"prob: wanted 0 < min <= max <= 1, got {prob}")
        self.prob = self.max_prob
        self.name: str | None = None  # written by the training loop, for logs

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, of shape (..., channels)."""
        change = self.change(x.requires_grad, x.shape[-1])
        return x if change is None else gradient_hook(x, change, x)

    def change(self, wanted: bool, channels: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Draws whether to act: ``(gradient, x)`` -> the gradient of x, or None.

        Args:
            wanted: whether x requires a gradient.
            channels: how many x has, along its last dimension.
        """
        grad_scale = number(self.grad_scale)
        if not wanted or (not self.training and being_traced()):
            return None
        if not happens(self.prob) or grad_scale == 0:
            return None
        if channels % self.num_groups:
            raise ValueError(f"x: wanted channels in {self.num_groups} equal groups, got {channels} channels")
        return self._whitened_gradient

    def _whitened_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        if not has_values(x):
            return grad
        centred, offset, covariance = grouped_covariance(x, self.num_groups)
        norm, trace = norm_and_trace(covariance)
        metric = whitening_metric(norm, trace, covariance.shape[:2].numel())
        if logging_draw(0.005):
            limit = number(self.whitening_limit)
            logger.debug("Whiten %s: metric %.2f, limit %.2f", self.name, metric, limit)
        if metric < number(self.whitening_limit):
            self.prob = self.min_prob
            return grad
        self.prob = self.max_prob
        direction = whitening_direction(centred - offset, covariance, norm * norm / trace).reshape(x.shape)
        norm_of_grad = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, direction.dtype))
        scale = number(self.grad_scale) * norm_of_grad / (torch.linalg.vector_norm(direction) + TINY)
        return torch.addcmul(grad, direction, scale).to(grad.dtype)


def grouped_covariance(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The centred features and their covariance in each group of channels, in float32 (float64 for float64).

    Of large means, what was rounded away is as large as the deviation. So what is left of the mean is returned, and
    subtracted from the covariance.

    Args:
        x: (..., channels).
        num_groups: divides the channels.

    Returns:
        The features less their rounded mean, (groups, frames, channels / groups); the mean of these, (groups, 1,
        channels / groups); and the covariance, (groups, channels / groups, channels / groups).
    """
    frames = x.reshape(-1, num_groups, x.shape[-1] // num_groups)
    mean = frames.mean(dim=0, dtype=torch.promote_types(x.dtype, torch.float32))
    centred = (frames - mean).transpose(0, 1)
    offset = centred.mean(dim=1, keepdim=True)
    share = 1.0 / max(frames.shape[0], 1)
    known = offset.transpose(1, 2) @ offset
    return centred, offset, torch.baddbmm(known, centred.transpose(1, 2), centred, beta=-1.0, alpha=share)


def norm_and_trace(covariance: Tensor) -> tuple[float, float]:
    """The Frobenius norm of C, (groups, channels, channels), and its trace, over all groups: the host waits."""
    both = torch.linalg.vector_norm(covariance), covariance.diagonal(dim1=1, dim2=2).sum()
    norm, trace = torch.stack(both).tolist()
    return norm, trace


def whitening_metric(norm: float, trace: float, eigenvalues: int) -> float:
    """mean(eigenvalues^2) / mean(eigenvalues)^2 over all groups: 1 for white features and more otherwise.

    Args:
        norm, trace: of C; no eigenvalue is computed, tr(C^2) and tr(C) suffice.
        eigenvalues: how many there are.
    """
    mean = trace / eigenvalues
    return norm * norm / eigenvalues / (mean * mean + TINY)


def whitening_direction(centred: Tensor, covariance: Tensor, balance: float) -> Tensor:
    """The gradient of the metric with respect to the features, up to a positive factor: X (C - tr(C^2) / tr(C) I).

    Centring needs no term of its own: the result already has zero mean over the frames.

    Args:
        centred: X, (groups, frames, channels).
        covariance: C, (groups, channels, channels); it is overwritten.
        balance: tr(C^2) / tr(C).

    Returns:
        (frames, groups, channels).
    """
    covariance.diagonal(dim1=1, dim2=2).sub_(balance)
    return (centred @ covariance).transpose(0, 1)
