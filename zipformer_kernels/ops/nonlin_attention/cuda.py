"""Gated averaging on NVIDIA GPUs: the gates, linear in the frames, around the kernels of attention.

The second gate of forward is part of the average's kernel; the others are in ``csrc/nonlin_attention/cuda.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.launch import DTYPE_CODES, as_empty_like, call_cuda
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention.cuda import gated_average, unsupported, worthwhile
from zipformer_kernels.ops.attention.cuda_gradients import scores_gradients, values_gradient
from zipformer_kernels.ops.attention.scores import Use, grouped
from zipformer_kernels.ops.nonlin_attention.cpu import NO_ROWS, rows


def _forward(*args: Tensor | int | None) -> tuple[Tensor, Tensor]:
    scores, (gate, x, y, softmax), masks, _ = grouped(4, args)
    values = open_(gate.flatten(2), x.flatten(2)).view(x.shape)
    inner, out = gated_average(scores, softmax, masks, values, y)
    return out, inner


def _backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | None
) -> tuple[Tensor | None, ...]:
    scores, (gate, x, y, softmax), masks, penalty = grouped(4, args)
    (inner,), grad = saved, grads[0].to(x.dtype)
    flat = [t.flatten(2) for t in (gate, x, y)]
    dinner, dy = (t.view(x.shape) for t in close_backward(grad.flatten(2), inner.flatten(2), flat[2]))
    use = Use(slice(None), open_(*flat[:2]).view(x.shape), inner, dinner)
    dscores = scores_gradients(needs[:4], scores, softmax, masks, penalty, [use])
    dgate = dx = None
    if needs[4] or needs[5]:
        dv = values_gradient(scores, softmax, masks, dinner)
        dgate, dx = (t.view(x.shape) for t in open_backward(dv.flatten(2), *flat[:2]))
    return *dscores, *(None if t is None else as_empty_like(t, x) for t in (dgate, dx, dy)), None, None, None


def open_(s: Tensor, x: Tensor) -> Tensor:
    """x tanh(s); all (T, batch, channels)."""
    return _map("open", 1, s, x)[0]


def close(average: Tensor, y: Tensor) -> Tensor:
    """average y; all (T, batch, channels)."""
    return _map("close", 1, average, y)[0]


def open_backward(dvalues: Tensor, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of s and x from that of the values."""
    return _map("open_backward", 2, dvalues, s, x)


def close_backward(grad: Tensor, average: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the average and of y."""
    return _map("close_backward", 2, grad, average, y)


def _map(name: str, count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """So many results of a gate, contiguous."""
    inputs = tuple(x if x.stride(2) == 1 else x.contiguous() for x in inputs)
    x = inputs[0]
    results = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(count))
    if x.numel() > 0:
        given, written = [*map(rows, inputs), NO_ROWS][:3], [*map(rows, results), NO_ROWS][:2]
        call_cuda(f"nonlin_attention_{name}", x, *given, *written, *x.shape, DTYPE_CODES[x.dtype])
    return results


launchers = Launchers(unsupported, _forward, _backward, worthwhile)
