"""Swoosh, dropout with a given mask, and a linear layer, saving only their inputs for the backward pass.

With a = mask * Swoosh(x), elementwise::

    y = a W^T + b
    da = dy W,   dx = da * mask * Swoosh'(x),   dW = dy^T a,   db = sum over rows of dy

Forward is one elementwise pass from x to a and one matrix product; neither Swoosh(x) nor a is stored. Backward
is the product da, one pass that reads da and x and writes both dx and a once more, the product dW, and the
sum db, which torch takes: no pass of ours reads dy. All products are torch's, in its precision settings.

Source: ``ActivationDropoutAndLinear`` in upstream's ``scaling.py``.

A stream brings few frames at a time, and its feed-forward modules take the time in which their weights are read. There
`infer_feed_forward` is one kernel, both products included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.call import autocast_dtype
from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.shapes import check_shapes
from zipformer_kernels.ops.swoosh_linear import cpu, cuda, eager, reference

_op = Op(
    "swoosh_linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? mask, str kind, ScalarType dtype",
    reference=reference.swoosh_linear,
    backends={
        "eager": eager.launchers,
        "cpu": cpu.launchers,
        "cuda": cuda.launchers,
        **triton_launchers(__name__),
    },
    saves=("x", "weight", "bias", "mask"),
    fake=lambda x, weight, bias, mask, kind, dtype: (x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype),),
)

_op.variant(
    "feed_forward",
    "Tensor src, Tensor in_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, str kind",
    when="a feed-forward module and its residual sum, without gradients, on few rows",
    reference=reference.feed_forward,
    saves=(),
)


def swoosh_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    *,
    backend: str | None = None,
) -> Tensor:
    """linear(Swoosh(x) * mask, weight, bias).

    Args:
        x: (..., in_channels), floating-point, of any strides and device. Contiguous is the fast layout;
            others are copied.
        weight: (out_channels, in_channels); of the dtype of x, or any under autocast.
        bias: (out_channels,), or None.
        mask: what the activation is multiplied by, scale of the dropout included; or None. Broadcasts to x,
            of size 1 where it is shared, e.g. (1, batch, in_channels) for x in (time, batch, in_channels). A
            constant: it gets no gradient.
        kind: ``l`` for SwooshL, ``r`` for SwooshR.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        (..., out_channels), of the dtype of x, or of autocast's dtype under autocast (but float64 stays), as
        `torch.nn.functional.linear` would give. The activation and the mask are applied in float32 or better
        and rounded once, to the dtype of the matrix product.
    Raises:
        TypeError: an argument is not a floating-point tensor, or of a dtype that does not fit.
        ValueError: a shape, device or kind does not fit, or the mask requires a gradient.
        BackendError: `backend` cannot serve the call.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("mask", mask)):
        if tensor is None and name in ("bias", "mask"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if kind not in ("l", "r"):
        raise ValueError(f"kind must be 'l' or 'r', got {kind!r}")
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (out_channels, in_channels) for x in (..., in_channels), got "
            f"{tuple(weight.shape)} for {tuple(x.shape)}"
        )
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if mask is not None:
        _check_mask(mask, x)
    # Float64 passes through autocast as it is.
    product = autocast_dtype(x)
    if x.dtype != torch.float64 and product is not None:
        return _op(x, weight, bias, mask, kind, product, backend=backend)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be of the dtype of x, {x.dtype}, without autocast, got {tensor.dtype}")
    return _op(x, weight, bias, mask, kind, x.dtype, backend=backend)


def infer_feed_forward(
    src: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    kind: str,
    *,
    backend: str | None = None,
) -> Tensor:
    """src + linear(Swoosh(linear(src, in_weight, in_bias)), out_weight, out_bias); the result carries no gradient.

    Args:
        src: (..., channels). ``auto`` takes the kernel for few rows, see `zipformer_kernels.core.launch.few_rows`.
        in_weight: (hidden, channels).
        in_bias: (hidden,), or None.
        out_weight: (channels, hidden).
        out_bias: (channels,), or None. All of one dtype.
        kind: ``l`` for SwooshL, ``r`` for SwooshR.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        A new tensor of the shape and dtype of src.
    Raises:
        ValueError: a shape or kind does not fit.
        BackendError: `backend` cannot serve the call.
    """
    hidden, channels = in_weight.shape
    if src.shape[-1] != channels or out_weight.shape != (channels, hidden):
        raise ValueError(
            f"out_weight must have shape (channels, hidden) for src in (..., channels) and in_weight in (hidden, "
            f"channels), got {tuple(out_weight.shape)} for {tuple(src.shape)} and {tuple(in_weight.shape)}"
        )
    check_shapes(in_bias=(in_bias, (hidden,)), out_bias=(out_bias, (channels,)))
    if kind not in ("l", "r"):
        raise ValueError(f"kind must be 'l' or 'r', got {kind!r}")
    feed_forward = _op.variants["feed_forward"]
    return feed_forward(src, in_weight, in_bias, out_weight, out_bias, kind, backend=backend)


def _check_mask(mask: Tensor, x: Tensor) -> None:
    fits = mask.ndim <= x.ndim and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask must broadcast to x, of shape {tuple(x.shape)}, got {tuple(mask.shape)}")
    if mask.requires_grad:
        raise ValueError("mask must not require a gradient: it is a constant here")
