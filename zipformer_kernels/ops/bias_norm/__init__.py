"""BiasNorm, saving only its input and one number per row for the backward pass.

Over the C channels of a row::

    y = x exp(log_scale) / rms(x - bias),   rms(d) = sqrt(mean_c(d_c^2)),   with no epsilon

With r = 1 / rms(x - bias), s = exp(log_scale) r, q = sum_c dy_c x_c r and t_c = r (x_c - bias_c) s q / C::

    dx_c = s dy_c - t_c,   dbias_c = sum over rows of t_c,   dlog_scale = exp(log_scale) sum over rows of q

Sums of gradients over rows are taken in two stages of fixed order: the same inputs give the same bits.

Source: section 3.3 of the Zipformer paper (arXiv:2310.11230); ``BiasNorm`` in upstream's ``scaling.py``.
"""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.bias_norm import cpu, cuda, eager, reference

_op = Op(
    "bias_norm",
    "Tensor x, Tensor bias, Tensor log_scale",
    reference=reference.bias_norm,
    backends={
        "eager": eager.launchers,
        "cpu": cpu.launchers,
        "cuda": cuda.launchers,
        **triton_launchers(__name__),
    },
    saves=("x", "bias", "log_scale"),
    extras=1,
    fake=reference.empty_results,
)


def bias_norm(
    x: Tensor, bias: Tensor, log_scale: Tensor, channel_dim: int = -1, *, backend: str | None = None
) -> Tensor:
    """x * exp(log_scale) / RMS(x - bias), the mean of the RMS over the channels, with no epsilon.

    Args:
        x: floating-point, of any shape, strides and device. Contiguous with channels last is the fast layout;
            others are copied.
        bias: (channels,), floating-point.
        log_scale: floating-point, of no dimensions.
        channel_dim: which dimension of x holds the channels; may be negative.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        A tensor of the shape of x and of the dtype that x and bias promote to, as upstream's: half precision
        with float32 parameters gives float32, also under autocast. Sums are taken in float32 or better. All
        backends but eager are right for every RMS that is a normal float32; eager, like upstream, for those
        whose square is one. Where x equals bias in all channels, x * infinity, as upstream.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape or device does not fit.
        BackendError: `backend` cannot serve the call.
    """
    for name, tensor in (("x", x), ("bias", bias), ("log_scale", log_scale)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if not -x.ndim <= channel_dim < x.ndim:
        raise ValueError(f"channel_dim must be a dimension of x, of shape {tuple(x.shape)}, got {channel_dim}")
    channels = x.shape[channel_dim]
    if bias.ndim != 1 or bias.shape[0] != channels:
        raise ValueError(f"bias must have shape ({channels},), as x has {channels} channels, got {tuple(bias.shape)}")
    if log_scale.ndim != 0:
        raise ValueError(f"log_scale must have no dimensions, got shape {tuple(log_scale.shape)}")
    if channel_dim in (-1, x.ndim - 1):
        return _op(x, bias, log_scale, backend=backend)
    return _op(x.movedim(channel_dim, -1), bias, log_scale, backend=backend).movedim(-1, channel_dim)
