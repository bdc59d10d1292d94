"""The depthwise convolution of images, padded to keep their size.

Per sequence and channel c, x zero beyond its edges, for kernels of I = 2 H + 1 by J = 2 G + 1 taps::

    y_tfc = b_c + sum_ij w_cij x_(t + i - H)(f + j - G)c

    dx_tfc = sum_ij w_cij dy_(t - i + H)(f - j + G)c
    dw_cij = sum_tf dy_tfc x_(t + i - H)(f + j - G)c,   db_c = sum_tf dy_tfc

Forward and dx are torch's convolutions on every backend. The kernel is for dw, which torch on the CPU takes many times
longer for, though it has no more to compute. Its sums are taken in two stages of fixed order: the same inputs give the
same bits.

Source: the ``depthwise_conv`` of ``ConvNeXt`` in upstream's ``subsampling.py``, after arXiv:2206.14747.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.call import autocast_dtype
from zipformer_kernels.core.op import Op
from zipformer_kernels.ops.depthwise_conv2d import cpu, eager, reference

_op = Op(
    "depthwise_conv2d",
    "Tensor x, Tensor weight, Tensor? bias",
    reference=reference.depthwise_conv2d,
    backends={"eager": eager.launchers, "cpu": cpu.launchers},
    saves=("x", "weight", "bias"),
)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The depthwise convolution of x, of stride 1 and zero-padded by half the kernel.

    Args:
        x: (batch, channels, T, frequencies), floating-point, on any device. `torch.channels_last` is the fast layout.
        weight: (channels, 1, I, J), I and J odd; of the dtype of x, or any under autocast.
        bias: (channels,), or None; of the same dtype.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        A tensor of the shape, dtype and memory format of x; under autocast, of autocast's dtype (float64 stays).
    Raises:
        TypeError: an argument is not a tensor of a dtype that fits.
        ValueError: a shape or device does not fit.
        BackendError: `backend` cannot serve the call.
    """
    _check(x, weight, bias)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != x.dtype:
            raise TypeError(f"{name} must be of the dtype of x, {x.dtype}, without autocast, got {parameter.dtype}")
    return _op(x, weight, bias, backend=backend)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if x.ndim != 4:
        raise ValueError(f"x must have shape (batch, channels, T, frequencies), got {tuple(x.shape)}")
    channels = x.shape[1]
    if weight.ndim != 4 or weight.shape[:2] != (channels, 1):
        raise ValueError(f"weight must have shape ({channels}, 1, I, J), got {tuple(weight.shape)}")
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight must have odd numbers of taps, got {tuple(weight.shape[2:])}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
