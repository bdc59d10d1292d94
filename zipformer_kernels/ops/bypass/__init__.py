"""The bypass around a layer or a stack: a mixture of what went in and what came out, for each channel.

With a = src_orig, b = src and c = scale::

    y = a + (b - a) c

    db = dy c,   da = dy - db,   dc = sum over all that shares c of dy (b - a)

The sums are taken in two stages of fixed order: the same inputs give the same bits.

Source: section 3.2 of the Zipformer paper (arXiv:2310.11230); ``BypassModule`` in upstream's ``zipformer.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zipformer_kernels.core.backend import BackendError
from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.bypass import cpu, cuda, eager, reference

_op = Op(
    "bypass",
    "Tensor src_orig, Tensor src, Tensor scale",
    reference=reference.bypass,
    backends={
        "eager": eager.launchers,
        "cpu": cpu.launchers,
        "cuda": cuda.launchers,
        **triton_launchers(__name__),
    },
    saves=("src_orig", "src", "scale"),
    fake=reference.empty_results,
)

_op.variant(
    "scale",
    "Tensor scale, Tensor? skips, Tensor? straight, float skip_rate, float straight_rate, int batch",
    when="the scale of each sequence where some skip, or go straight through, at random",
    reference=reference.random_scale,
    saves=("scale", "skips", "straight"),
    fake=lambda scale, *rest: (scale.new_empty(rest[-1], *scale.shape),),
)

_op.variant(
    "limit",
    "Tensor grad, Tensor x, float least, float most",
    when="the gradient of a scale, or of any parameter, that training holds within limits",
    reference=reference.limited_gradient,
    saves=("grad", "x"),
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
    _check(src_orig=src_orig, src=src, scale=scale)
    shape = tuple(src_orig.shape)
    if len(shape) < 2:
        raise ValueError(f"src_orig must have shape (..., B, C), got {shape}")
    if src.shape != shape:
        raise ValueError(f"src must have the shape of src_orig, {shape}, got {tuple(src.shape)}")
    if scale.shape != shape[-1:] and scale.shape != shape[-2:]:
        raise ValueError(f"scale must have shape {shape[-1:]} or {shape[-2:]}, got {tuple(scale.shape)}")
    return _op(src_orig, src, scale, backend=backend)


def random_scale(
    scale: Tensor, skips: Tensor | None, straight: Tensor | None, skip_rate: float, straight_rate: float, batch: int
) -> Tensor:
    """The scale of each sequence: 0 where it skips, 1 or more where it goes straight through.

    Args:
        scale: (C,), floating-point, on any device.
        skips: (batch, 1), uniform on [0, 1): a sequence skips where it is not above `skip_rate`; None if none does.
        straight: (batch, 1), as well: a sequence goes straight through where it is below `straight_rate`; or None.
        skip_rate, straight_rate: the probabilities.
        batch: how many sequences there are.
    Returns:
        (batch, C), of the dtype of scale. It has no kernels but Triton's, and takes PyTorch where those do not serve.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape or device does not fit.
    """
    drawn = {name: x for name, x in (("skips", skips), ("straight", straight)) if x is not None}
    _check(scale=scale, **drawn)
    if scale.ndim != 1:
        raise ValueError(f"scale must have shape (C,), got {tuple(scale.shape)}")
    for name, x in drawn.items():
        if x.shape != (batch, 1):
            raise ValueError(f"{name} must have shape ({batch}, 1), got {tuple(x.shape)}")
    return _where_served(_op.variants["scale"], scale, skips, straight, skip_rate, straight_rate, batch)


def limited_gradient(grad: Tensor, x: Tensor, least: float, most: float) -> Tensor:
    """grad, turned where it would push x, by descent, further out of [least, most].

    Args:
        grad, x: of one shape, floating-point, on any device.
        least, most: the limits.
    Returns:
        A tensor like grad. It has no kernels but Triton's, and takes PyTorch where those do not serve.
    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape or device does not fit.
    """
    _check(grad=grad, x=x)
    if grad.shape != x.shape:
        raise ValueError(f"x must have the shape of grad, {tuple(grad.shape)}, got {tuple(x.shape)}")
    return _where_served(_op.variants["limit"], grad, x, least, most)


def _where_served(variant: Op, *args: Any) -> Tensor:
    """A variant on a backend that was asked for, or, where that does not serve what is so small, in PyTorch."""
    try:
        return variant(*args)
    except BackendError:
        return variant(*args, backend="eager")


def _check(**tensors: Tensor) -> None:
    """That all are floating-point tensors on the device of the first."""
    (first, model), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != model.device:
            raise ValueError(f"{name} must be on the device of {first}, {model.device}, got {tensor.device}")
