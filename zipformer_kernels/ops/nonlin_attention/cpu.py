"""Gated averaging on the CPU: the gates in torch, linear in the frames, around the compiled kernels of attention."""

from __future__ import annotations

from typing import NamedTuple

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
from zipformer_kernels.ops.attention.scores import grouped


class Rows(NamedTuple):
    """`NonlinRows` of ``csrc/nonlin_attention/nonlin_attention.h``."""

    data: int
    frame: int
    sequence: int


NO_ROWS = Rows(0, 0, 0)


def rows(x: Tensor) -> Rows:
    """A tensor (T, batch, channels) with channels of stride 1, for kernels."""
    return Rows(pointer(x), *x.stride()[:2])


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
    return (close(projected, bias, attention.average(weights, open_(projected, bias))),)


def open_(projected: Tensor, bias: Tensor | None) -> Tensor:
    """x tanh(s) by the compiled kernel; arguments contiguous, as of `infer_nonlin_attention`."""
    values, *sizes = _result(projected)
    call_cpu("nonlin_attention_open", projected, *map(pointer, (projected, bias)), NO_ROWS, pointer(values), *sizes)
    return values


def close(projected: Tensor, bias: Tensor | None, average: Tensor) -> Tensor:
    """average y by the compiled kernel; `average`, (T, batch, channels), with channels of stride 1."""
    out, *sizes = _result(projected)
    inputs = *map(pointer, (projected, bias)), rows(average)
    call_cpu("nonlin_attention_close", projected, *inputs, pointer(out), *sizes)
    return out


def _result(projected: Tensor) -> tuple[Tensor, int, int, int, int]:
    """What a gate fills in, and its sizes and dtype."""
    frames, batch, channels = projected.shape[0], projected.shape[1], projected.shape[2] // 3
    return projected.new_empty(frames, batch, channels), frames, batch, channels, DTYPE_CODES[projected.dtype]


launchers = Launchers(
    attention.unsupported,
    _forward,
    _backward,
    attention.worthwhile,
    variants={"infer": Launchers(lambda *args: unsupported_dtypes(args, INFERENCE_DTYPES), _infer, None)},
)
