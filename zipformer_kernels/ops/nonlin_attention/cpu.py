"""Gated averaging on the CPU: the gates in torch, linear in the frames, around the compiled kernels of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.launch import (
    DTYPE_CODES,
    INFERENCE_DTYPES,
    call_cpu,
    contiguous,
    pointer,
    unsupported_dtypes,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention import cpu as attention
from zipformer_kernels.ops.attention.arguments import unit_stride
from zipformer_kernels.ops.attention.scores import grouped
from zipformer_kernels.ops.nonlin_attention.gates import BY_TORCH, GatedLaunchers, Gates
from zipformer_kernels.ops.nonlin_attention.native import Rows, rows


def _forward(*args: Tensor | int | None) -> tuple[Tensor, Tensor]:
    scores, (gate, x, y, softmax), masks, penalty = grouped(4, args)
    (inner,) = attention.forward(*scores, torch.tanh(gate).mul_(x), softmax, *masks, *penalty)
    return torch.mul(inner, y, out=torch.empty_like(inner)), inner


def _backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | None
) -> tuple[Tensor | None, ...]:
    scores, (gate, x, y, softmax), masks, penalty = grouped(4, args)
    (inner,), (grad,) = saved, grads
    opened = torch.tanh(gate)
    wanted = *needs[:4], needs[4] or needs[5]
    use = *scores, x * opened, softmax, *masks, *penalty
    *dscores, dv = attention.backward(wanted, (grad * y,), saved, *use)[:5]
    dgate = torch.ops.aten.tanh_backward(dv * x, opened) if needs[4] else None
    dx = dv * opened if needs[5] else None
    return *dscores, dgate, dx, grad * inner if needs[6] else None, None, None, None


def _infer(projected: Tensor, bias: Tensor | None, weights: Tensor) -> tuple[Tensor]:
    frames, batch, width = projected.shape
    if projected.numel() == 0:
        return (projected.new_empty(frames, batch, width // 3),)
    projected, bias = contiguous(projected, bias)
    s, x, y = projected.chunk(3, dim=2)
    average = attention.average(weights, _opened(s, x, bias))
    return (_closed(average, y, None if bias is None else bias[2 * width // 3 :]),)


def _opened(s: Tensor, x: Tensor, bias: Tensor | None, values: Tensor | None = None) -> Tensor:
    """x tanh(s), each with its part of the bias added before, in `values` if given; both with channels of stride 1."""
    values = x.new_empty(x.shape) if values is None else values
    _call("open", s, *map(rows, (s, x)), pointer(bias), pointer(values))
    return values


def _closed(average: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """average y, with the bias of y added before; both with channels of stride 1."""
    out = y.new_empty(y.shape)
    _call("close", y, *map(rows, (average, y)), pointer(bias), pointer(out))
    return out


def _open(s: Tensor, x: Tensor) -> Tensor:
    if s.dtype not in INFERENCE_DTYPES:
        return BY_TORCH.open_(s, x)
    return _opened(unit_stride(s), unit_stride(x), None)


def _close(average: Tensor, y: Tensor) -> Tensor:
    if y.dtype not in INFERENCE_DTYPES:
        return BY_TORCH.close(average, y)
    return _closed(unit_stride(average), unit_stride(y), None)


def _close_backward(grad: Tensor, average: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    if y.dtype not in INFERENCE_DTYPES:
        return BY_TORCH.close_backward(grad, average, y, dy)
    grad, average, y = map(unit_stride, (grad, average, y))
    inner = torch.empty_like(average)
    _call("close_backward", y, *map(rows, (grad, average, y, inner, dy)))
    return inner


def _open_backward(dvalues: Tensor, s: Tensor, x: Tensor, ds: Tensor, dx: Tensor, values: Tensor | None) -> None:
    if s.dtype not in INFERENCE_DTYPES:
        return BY_TORCH.open_backward(dvalues, s, x, ds, dx, values)
    dvalues, s, x = map(unit_stride, (dvalues, s, x))
    if values is not None:
        _opened(s, x, None, values)
    return _call("open_backward", s, *map(rows, (dvalues, s, x, ds, dx)))


def _call(name: str, x: Tensor, *args: Rows | int) -> None:
    """Calls a kernel with the sizes and the dtype of x, if there is anything to do."""
    if x.numel() > 0:
        call_cpu(f"nonlin_attention_{name}", x, *args, *x.shape, DTYPE_CODES[x.dtype])


launchers = GatedLaunchers(
    attention.unsupported,
    _forward,
    _backward,
    attention.worthwhile,
    gates=Gates(_open, _close, _close_backward, _open_backward),
    variants={"infer": Launchers(lambda *args: unsupported_dtypes(args, INFERENCE_DTYPES), _infer, None)},
)
