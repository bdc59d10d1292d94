"""The activations SwooshL and SwooshR, saving only their input for the backward pass.

With (shift, offset) = (4, 0.035) for L and (1, 0.313261687) for R::

    y  = log(1 + exp(x - shift)) - 0.08 x - offset
    dx = dy (sigmoid(x - shift) - 0.08)

Source: section 3.4 of the Zipformer paper (arXiv:2310.11230); ``SwooshL``, ``SwooshR`` in upstream's ``scaling.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.call import plain
from zipformer_kernels.core.op import Op, SettledBackend, triton_launchers
from zipformer_kernels.ops.swoosh import cpu, cuda, eager, reference

_op = Op(
    "swoosh",
    "Tensor x, str kind",
    reference=reference.swoosh,
    backends={
        "eager": eager.launchers,
        "cpu": cpu.launchers,
        "cuda": cuda.launchers,
        **triton_launchers(__name__),
    },
    saves=("x",),
)


def swoosh_l(x: Tensor, *, backend: str | None = None) -> Tensor:
    """SwooshL(x) = log(1 + exp(x - 4)) - 0.08 x - 0.035, elementwise.

    Args:
        x: a floating-point tensor of any shape, strides and device.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        A tensor of the shape and dtype of x. Half precision is computed in float32. Finite for every finite x.
    Raises:
        TypeError: x is not a floating-point tensor.
        BackendError: `backend` cannot serve the call.
    """
    return swoosh(x, "l", backend)


def swoosh_r(x: Tensor, *, backend: str | None = None) -> Tensor:
    """SwooshR(x) = log(1 + exp(x - 1)) - 0.08 x - 0.313261687, elementwise; zero at zero.

    Arguments, result and errors as for `swoosh_l`.
    """
    return swoosh(x, "r", backend)


def swoosh_(x: Tensor, kind: str, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Overwrites x with swoosh(x + bias), without a gradient: for inference.

    Args:
        x: a contiguous floating-point tensor, (..., channels).
        kind: "l" or "r".
        bias: (channels,), of the dtype of x; or None.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        x.
    Raises:
        ValueError: the bias does not fit x.
        BackendError: the backend asked for cannot serve the call.
    """
    _check_bias(x, bias)
    settled = type(backend) is SettledBackend
    name = backend if settled else _op.select(backend, x, kind)
    if name == "cpu" and (settled or plain(x, bias)) and x.is_contiguous():
        cpu.overwrite(x, kind, bias)
        return x
    return x.copy_(_op(x if bias is None else x + bias, kind, backend=backend))


def swoosh_backward_(dy: Tensor, x: Tensor, kind: str, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Overwrites dy with dy swoosh'(x + bias) and x with swoosh(x + bias): for a backward pass that computes x again.

    Args:
        dy: a contiguous tensor of the shape and dtype of x.
        x, kind, bias: as of `swoosh_`.
    Returns:
        dy and x.
    Raises:
        ValueError: the bias or dy does not fit x.
        BackendError: the backend asked for cannot serve the call.
    """
    _check_bias(x, bias)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        wanted = f"{tuple(x.shape)} in {x.dtype}"
        raise ValueError(f"dy must be of shape {wanted}, got {tuple(dy.shape)} in {dy.dtype}")
    if _op.select(None, x, kind) == "cpu" and plain(dy, x, bias) and x.is_contiguous() and dy.is_contiguous():
        cpu.overwrite_backward(dy, x, kind, bias)
        return dy, x
    with torch.enable_grad():
        shifted = (x if bias is None else x + bias).detach().requires_grad_()
        y = _op(shifted, kind)
        (dx,) = torch.autograd.grad(y, shifted, dy)
    return dy.copy_(dx), x.copy_(y.detach())


def _check_bias(x: Tensor, bias: Tensor | None) -> None:
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype):
        wanted = f"({x.shape[-1]},) in {x.dtype}"
        raise ValueError(f"bias must be of shape {wanted}, got {tuple(bias.shape)} in {bias.dtype}")


def swoosh(x: Tensor, kind: str, backend: str | None = None) -> Tensor:
    """`swoosh_l` of x for kind "l", `swoosh_r` for kind "r"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    return _op(x, kind, backend=backend)
