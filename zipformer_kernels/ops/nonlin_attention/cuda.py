"""Gated averaging on NVIDIA GPUs: the gates, linear in the frames, around the kernels of attention.

The second gate of forward is part of the average's kernel; the others are in ``csrc/nonlin_attention/cuda.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.launch import DTYPE_CODES, as_empty_like, call_cuda
from zipformer_kernels.ops.attention.arguments import unit_stride
from zipformer_kernels.ops.attention.cuda import gated_average, unsupported, worthwhile
from zipformer_kernels.ops.attention.cuda_gradients import scores_gradients, values_gradient
from zipformer_kernels.ops.attention.scores import Use, grouped
from zipformer_kernels.ops.nonlin_attention.gates import GatedLaunchers, Gates
from zipformer_kernels.ops.nonlin_attention.native import NO_ROWS, rows


def _forward(*args: Tensor | int | None) -> tuple[Tensor, Tensor]:
    scores, (gate, x, y, softmax), masks, _ = grouped(4, args)
    heads = x.shape[2:]
    values = open_(gate.flatten(2), x.flatten(2)).unflatten(2, heads)
    inner, out = gated_average(scores, softmax, masks, values, y)
    return out, inner


def _backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | None
) -> tuple[Tensor | None, ...]:
    scores, (gate, x, y, softmax), masks, penalty = grouped(4, args)
    (inner,), grad = saved, grads[0].to(x.dtype)
    dgate, dx, dy = None, None, x.new_empty(x.shape)
    dinner = close_backward(*(t.flatten(2) for t in (grad, inner, y, dy))).view(x.shape)
    dscores, values = [None] * 4, x.new_empty(x.shape)
    if needs[4] or needs[5]:
        dvalues = values_gradient(scores, softmax, masks, dinner)
        dgate, dx = x.new_empty(x.shape), x.new_empty(x.shape)
        open_backward(*(t.flatten(2) for t in (dvalues, gate, x, dgate, dx, values)))
    elif any(needs[:4]):
        values = open_(gate.flatten(2), x.flatten(2)).view(x.shape)
    if any(needs[:4]):
        use = Use(slice(None), values, inner, dinner)
        dscores = scores_gradients(needs[:4], scores, softmax, masks, penalty, [use])
    return *dscores, *(d if d is None else as_empty_like(d, x) for d in (dgate, dx, dy)), None, None, None


def open_(s: Tensor, x: Tensor) -> Tensor:
    """x tanh(s), contiguous; all (T, batch, channels), as below."""
    return _map("open", (s, x), x.new_empty(x.shape))


def close(average: Tensor, y: Tensor) -> Tensor:
    """average y, contiguous."""
    return _map("close", (average, y), y.new_empty(y.shape))


def close_backward(grad: Tensor, average: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the average, as that lies in memory; fills that of y."""
    average = unit_stride(average)
    return _map("close_backward", (grad, average, y), torch.empty_like(average), dy)


def open_backward(dvalues: Tensor, s: Tensor, x: Tensor, ds: Tensor, dx: Tensor, values: Tensor | None = None) -> None:
    """Fills the gradients of s and x from that of the values, and the values, if given."""
    _map("open_backward", (dvalues, s, x), ds, dx, *(() if values is None else (values,)))


def _map(name: str, inputs: tuple[Tensor, ...], *results: Tensor) -> Tensor:
    """Fills the results of a gate, whose channels have stride 1, and returns the first."""
    inputs = tuple(map(unit_stride, inputs))
    x = inputs[-1]
    if x.numel() > 0:
        given, written = [*map(rows, inputs), NO_ROWS][:3], [*map(rows, results), NO_ROWS, NO_ROWS][:3]
        call_cuda(f"nonlin_attention_{name}", x, *given, *written, *x.shape, DTYPE_CODES[x.dtype])
    return results[0]


launchers = GatedLaunchers(
    unsupported,
    _forward,
    _backward,
    worthwhile,
    gates=Gates(open_, close, close_backward, open_backward),
)
