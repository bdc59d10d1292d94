"""Every few frames become one: a mean weighted by a softmax over one number for each place.

With F = len(bias), w = softmax(bias) and x of T frames, the last of which is repeated where F does not divide T::

    y[i] = mask sum_p w[p] x[min(i F + p, T - 1)]

    dx[t]   = mask sum of w[p] dy[i] over all (i, p) that read frame t
    dw[p]   = sum over i and channels of mask dy[i] x[min(i F + p, T - 1)]
    dbias   = w (dw - sum_p w[p] dw[p])

y may have more channels than x: those are zero. The mask, a dropout of channels, has no gradient.

Source: section 3.1 of the Zipformer paper (arXiv:2310.11230); ``SimpleDownsample`` in upstream's ``zipformer.py``.
"""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.downsample import eager, reference

_op = Op(
    "downsample",
    "Tensor src, Tensor bias, Tensor? mask, int channels",
    reference=reference.downsample,
    backends={"eager": eager.launchers, **triton_launchers(__name__)},
    saves=("src", "bias", "mask"),
    fake=reference.empty_results,
)


def downsample(
    src: Tensor, bias: Tensor, mask: Tensor | None = None, channels: int | None = None, *, backend: str | None = None
) -> Tensor:
    """Weighted means of every len(bias) frames.

    Args:
        src: (T, B, C), floating-point, on any device. Any strides are read whose channels lie side by side; others are
            copied.
        bias: (F,), at least one: the logarithms of the weights; of any floating-point dtype.
        mask: (B, channels), multiplies the result, without a gradient; of any dtype.
        channels: of the result, C by default; those beyond C are zero.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        (ceil(T / F), B, channels), in the dtype that src and bias promote to. ``triton`` computes in float32.
    Raises:
        TypeError: src or bias is not a floating-point tensor, or mask no tensor.
        ValueError: a shape, a device or the number of channels does not fit.
        BackendError: `backend` cannot serve the call.
    """
    for name, tensor in (("src", src), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if src.ndim != 3:
        raise ValueError(f"src must have shape (T, B, C), got {tuple(src.shape)}")
    if bias.ndim != 1 or bias.shape[0] == 0:
        raise ValueError(f"bias must have shape (F,), got {tuple(bias.shape)}")
    channels = src.shape[2] if channels is None else channels
    if channels < src.shape[2]:
        raise ValueError(f"channels must be {src.shape[2]} or more, as src has, got {channels}")
    if mask is not None and mask.shape != (src.shape[1], channels):
        raise ValueError(f"mask must have shape {(src.shape[1], channels)}, got {tuple(mask.shape)}")
    for name, tensor in (("bias", bias), ("mask", mask)):
        if tensor is not None and tensor.device != src.device:
            raise ValueError(f"{name} must be on the device of src, {src.device}, got {tensor.device}")
    return _op(src, bias, None if mask is None else mask.detach(), channels, backend=backend)
