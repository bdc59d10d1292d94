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

from zipformer_kernels.core.backend import BackendError
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

_op.variant(
    "bypass",
    "Tensor x, Tensor bias, Tensor log_scale, Tensor src_orig, Tensor scale",
    when="the norm at the end of a layer and the bypass after it, in one pass",
    reference=reference.bypass,
    saves=("x", "bias", "log_scale", "src_orig", "scale"),
    extras=1,
    fake=reference.empty_bypass_results,
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
    _check(x=x, bias=bias, log_scale=log_scale)
    if not -x.ndim <= channel_dim < x.ndim:
        raise ValueError(f"channel_dim must be a dimension of x, of shape {tuple(x.shape)}, got {channel_dim}")
    channels = x.shape[channel_dim]
    _check_parameters(channels, bias, log_scale)
    if channel_dim in (-1, x.ndim - 1):
        return _op(x, bias, log_scale, backend=backend)
    return _op(x.movedim(channel_dim, -1), bias, log_scale, backend=backend).movedim(-1, channel_dim)


def bias_norm_bypass(
    x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor, *, backend: str | None = None
) -> Tensor:
    """src_orig + (bias_norm(x) - src_orig) * scale, in one pass forward and one backward.

    With n = bias_norm(x), the gradients are those of the bypass, and those of the norm for dn = dy scale.

    Args:
        x: (..., B, C), floating-point, of any strides and device. Contiguous is the fast layout; others are copied.
        bias, log_scale: of the norm, as of `bias_norm`.
        src_orig: of the shape of x.
        scale: (C,), or (B, C) with a scale for each sequence.
        backend: which backend to use; see `zipformer_kernels.core.backend`. ``cuda`` takes at most 1024 channels, a
            multiple of 16 bytes of x; ``triton`` at most 2048; ``cpu`` runs one op after the other.
    Returns:
        A tensor of the shape of x and of the dtype that x, bias, src_orig and scale promote to. On a GPU n is not
        rounded in between.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape or device does not fit.
        BackendError: `backend` cannot serve the call.
    """
    _check(x=x, bias=bias, log_scale=log_scale, src_orig=src_orig, scale=scale)
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise ValueError(f"x must have shape (..., B, C), got {shape}")
    _check_parameters(shape[-1], bias, log_scale)
    if src_orig.shape != shape:
        raise ValueError(f"src_orig must have the shape of x, {shape}, got {tuple(src_orig.shape)}")
    if scale.shape != shape[-1:] and scale.shape != shape[-2:]:
        raise ValueError(f"scale must have shape {shape[-1:]} or {shape[-2:]}, got {tuple(scale.shape)}")
    return _op.variants["bypass"](x, bias, log_scale, src_orig, scale, backend=backend)


def one_pass_backend(*args: Tensor) -> str | None:
    """The backend on which `bias_norm_bypass` with these arguments reads and writes everything once, if the call gets
    one; None where the two ops, one after the other, do as well.
    """
    try:
        name = _op.variants["bypass"].select(None, *args)
    except BackendError:
        return None
    return None if name in ("eager", "cpu") else name


def _check(**tensors: Tensor) -> None:
    """That all are floating-point tensors on the device of x."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != tensors["x"].device:
            raise ValueError(f"{name} must be on the device of x, {tensors['x'].device}, got {tensor.device}")


def _check_parameters(channels: int, bias: Tensor, log_scale: Tensor) -> None:
    """That they fit so many channels."""
    if bias.ndim != 1 or bias.shape[0] != channels:
        raise ValueError(f"bias must have shape ({channels},), as x has {channels} channels, got {tuple(bias.shape)}")
    if log_scale.ndim != 0:
        raise ValueError(f"log_scale must have no dimensions, got shape {tuple(log_scale.shape)}")
