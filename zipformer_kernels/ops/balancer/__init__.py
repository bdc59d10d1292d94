"""The Balancer's gradient: that of x, changed to bring each channel's mean / stddev and RMS back into their limits.

For one channel let m = mean / stddev and r its RMS. The loss is |m - clamp(m)| + |log(clamp(r) / r)|. With
z = (x - mean) / stddev, w = variance / r^2, and a = sign(m - clamp(m)), b = sign(clamp(r) - r), its gradient is::

    (a - b w m) + (-a m - b w) z        (times 1 / (N stddev), a constant of the channel)

which has RMS sqrt(level^2 + slope^2), level and slope being the two brackets. Scaled to RMS `grad_scale` and multiplied
elementwise by |grad|, an estimate of each element's own scale, it is added to `grad`.

The kernels take two passes: the moments of each channel, then the change. Moments are merged with the formula of Chan,
Golub and LeVeque (1979), which does not cancel, in a fixed order: the same inputs give the same bits.

The op runs inside of a backward pass. Its own gradients, which only gradients of gradients need, are those of the
formula on every backend.

Source: appendix A.3 of the Zipformer paper (arXiv:2310.11230); ``BalancerFunction`` in upstream's ``scaling.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.balancer import cpu, eager, reference
from zipformer_kernels.ops.shapes import check_shapes

_op = Op(
    "balancer",
    "Tensor grad, Tensor x, Tensor? variance, Tensor? mean, int channel_dim, float min_mean, float max_mean, "
    "float min_rms, float max_rms, float grad_scale",
    reference=reference.balanced_gradient,
    backends={"eager": eager.launchers, "cpu": cpu.launchers, **triton_launchers(__name__)},
    saves=("grad", "x", "variance", "mean"),
    fake=lambda grad, x, *_: (torch.empty_like(x, dtype=grad.dtype),),
)


def _fake_moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(x.shape[channel_dim], dtype=dtype) for _ in range(2))


_op.variant(
    "moments",
    "Tensor x, int channel_dim",
    when="the moments of channels alone, where x comes in parts",
    reference=reference.moments,
    saves=(),
    outputs=2,
    fake=_fake_moments,
)


def balanced_gradient(
    grad: Tensor,
    x: Tensor,
    *,
    moments: tuple[Tensor, Tensor] | None = None,
    channel_dim: int,
    min_mean: float,
    max_mean: float,
    min_rms: float,
    max_rms: float,
    grad_scale: float,
    backend: str | None = None,
) -> Tensor:
    """grad + |grad| times the direction that brings the channels of x back into their limits.

    Args:
        grad, x: of one shape, floating-point, on any device. Dense, with channels next to each other in memory, is the
            fast layout; others are copied. Computed in float32 (float64 for float64).
        moments: variance, by N, and mean, (channels,) in that dtype, of all of which x is a part; of x itself if None.
        channel_dim: the dimension of the channels, may be negative; moments are taken over all others.
        min_mean, max_mean: limits on mean / stddev.
        min_rms, max_rms: limits on the RMS.
        grad_scale: the RMS of the term that is added, relative to |grad|.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        A tensor of the shape of x and of the dtype of grad.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or dimension does not fit.
        BackendError: `backend` cannot serve the call.
    """
    variance, mean = (None, None) if moments is None else moments
    for name, tensor in (("grad", grad), ("x", x), ("variance", variance), ("mean", mean)):
        if tensor is not None:
            _check(name, tensor, grad)
    if grad.shape != x.shape:
        raise ValueError(f"x must have the shape of grad, {tuple(grad.shape)}, got {tuple(x.shape)}")
    _check_channel_dim(x, channel_dim)
    shape = (x.shape[channel_dim],)
    check_shapes(variance=(variance, shape), mean=(mean, shape))
    limits = min_mean, max_mean, min_rms, max_rms, grad_scale
    return _op(grad, x, variance, mean, channel_dim, *limits, backend=backend)


def channel_moments(x: Tensor, channel_dim: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Variance, by N, and mean of each channel; results carry no gradient.

    Args:
        x: floating-point, on any device; of the layout that `balanced_gradient` takes.
        channel_dim: the dimension of the channels, may be negative.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        Two tensors, (channels,), in float32 (float64 for float64); NaN where x is empty.
    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has no such dimension.
        BackendError: `backend` cannot serve the call.
    """
    _check("x", x, x)
    _check_channel_dim(x, channel_dim)
    return _op.variants["moments"](x, channel_dim, backend=backend)


def _check(name: str, tensor: Tensor, other: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of grad, {other.device}, got {tensor.device}")


def _check_channel_dim(x: Tensor, channel_dim: int) -> None:
    if not -x.ndim <= channel_dim < x.ndim:
        raise ValueError(f"channel_dim must be a dimension of x, of shape {tuple(x.shape)}, got {channel_dim}")
