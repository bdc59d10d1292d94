"""The bypass around a layer or a stack: a mixture of what went in and what came out, for each channel.

With a = src_orig, b = src and c = scale::

    y = a + (b - a) c

    db = dy c,   da = dy - db,   dc = sum over all that shares c of dy (b - a)

The sums are taken in two stages of fixed order: the same inputs give the same bits.

Source: section 3.2 of the Zipformer paper (arXiv:2310.11230); ``BypassModule`` in upstream's ``zipformer.py``.
"""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.core.op import Op
from zipformer_kernels.ops.bypass import cpu, eager, reference

_op = Op(
    "bypass",
    "Tensor src_orig, Tensor src, Tensor scale",
    reference=reference.bypass,
    backends={"eager": eager.launchers, "cpu": cpu.launchers},
    saves=("src_orig", "src", "scale"),
    fake=reference.empty_results,
)


def bypass(src_orig: Tensor, src: Tensor, scale: Tensor, *, backend: str | None = None) -> Tensor:
    """src_orig + (src - src_orig) * scale.

    Args:
        src_orig: (..., B, C), floating-point, on any device. Contiguous is the fast layout; others are copied.
        src: of the same shape; of any floating-point dtype.
        scale: (C,), or (B, C) with a scale for each sequence; of any floating-point dtype.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        A tensor of the shape of src_orig and of the dtype that the three promote to. ``cpu`` computes
        half precision in float32; ``eager`` rounds after each operation.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape or device does not fit.
        BackendError: `backend` cannot serve the call.
    """
    for name, tensor in (("src_orig", src_orig), ("src", src), ("scale", scale)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != src_orig.device:
            raise ValueError(f"{name} must be on the device of src_orig, {src_orig.device}, got {tensor.device}")
    shape = tuple(src_orig.shape)
    if len(shape) < 2:
        raise ValueError(f"src_orig must have shape (..., B, C), got {shape}")
    if src.shape != shape:
        raise ValueError(f"src must have the shape of src_orig, {shape}, got {tuple(src.shape)}")
    if scale.shape != shape[-1:] and scale.shape != shape[-2:]:
        raise ValueError(f"scale must have shape {shape[-1:]} or {shape[-2:]}, got {tuple(scale.shape)}")
    return _op(src_orig, src, scale, backend=backend)
