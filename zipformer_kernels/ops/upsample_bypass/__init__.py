"""The bypass around a stack at a lower frame rate: its frames are repeated, and mixed with what went in.

With a = src_orig of T frames, b = src of ceil(T / F), c = scale and m = mask, i = t // F::

    y[t] = a[t] + (m b[i] - a[t]) c

    da[t] = dy[t] - dy[t] c,   db[i] = m c sum_p dy[i F + p]
    dc    = sum over all that shares c of dy (m b - a)

No repeated frame is stored. src_orig may have fewer channels than src: the others are zero, and get no gradient. The
mask, a dropout of channels, has none. The sums are taken in two stages of fixed order: the same inputs give the same
bits.

Source: section 3.1 of the Zipformer paper (arXiv:2310.11230); ``DownsampledZipformerEncoder``, ``SimpleUpsample`` and
``BypassModule`` in upstream's ``zipformer.py``.
"""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.core.call import watcher
from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.upsample_bypass import eager, reference

_op = Op(
    "upsample_bypass",
    "Tensor src_orig, Tensor src, Tensor scale, Tensor? mask, int factor",
    reference=reference.upsample_bypass,
    backends={"eager": eager.launchers, **triton_launchers(__name__)},
    saves=("src_orig", "src", "scale", "mask"),
    fake=reference.empty_results,
)


def upsample_bypass(
    src_orig: Tensor,
    src: Tensor,
    scale: Tensor,
    factor: int,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """src_orig + (each frame of src `factor` times - src_orig) * scale.

    Args:
        src_orig: (T, B, at most C), floating-point, on any device. Any strides are read whose channels lie side by
            side; others are copied.
        src: (ceil(T / factor), B, C); of any floating-point dtype.
        scale: (C,), or (B, C) with a scale for each sequence; of any floating-point dtype.
        factor: how many frames one becomes.
        mask: (B, C), multiplies src, without a gradient; of any dtype.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        (T, B, C), in the dtype that the first three promote to. ``triton`` computes in float32.
    Raises:
        TypeError: one of the first three is not a floating-point tensor, or mask no tensor.
        ValueError: a shape, a device or the factor does not fit.
        BackendError: `backend` cannot serve the call.
    """
    for name, tensor in (("src_orig", src_orig), ("src", src), ("scale", scale)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    for name, tensor in (("src", src), ("scale", scale), ("mask", mask)):
        if tensor is not None and tensor.device != src_orig.device:
            raise ValueError(f"{name} must be on the device of src_orig, {src_orig.device}, got {tensor.device}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if src_orig.ndim != 3:
        raise ValueError(f"src_orig must have shape (T, B, C), got {tuple(src_orig.shape)}")
    frames, batch, own = src_orig.shape
    if src.ndim != 3 or src.shape[:2] != (-(-frames // factor), batch) or src.shape[2] < own:
        wanted = f"({-(-frames // factor)}, {batch}, {own} or more)"
        raise ValueError(f"src must have shape {wanted}, got {tuple(src.shape)}")
    shape = (batch, src.shape[2])
    if scale.shape not in (shape, shape[1:]):
        raise ValueError(f"scale must have shape {shape[1:]} or {shape}, got {tuple(scale.shape)}")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask must have shape {shape}, got {tuple(mask.shape)}")
    return _op(src_orig, src, scale, None if mask is None else mask.detach(), factor, backend=backend)


def has_kernels(x: Tensor) -> bool:
    """Whether this op, and downsampling, would run on kernels on tensors like x, which nobody looks at or records.

    Raises:
        BackendError: the backend that was asked for cannot serve such a call.
    """
    return watcher() is None and _op.select(None, x, x, x, None, 1) != "eager"
