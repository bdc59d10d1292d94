"""Launchers of the gated kernels; they share their kernels with `attention` (ops/attention/kernels.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention.scores import grouped
from zipformer_kernels.ops.attention.triton import (
    aggregate,
    compute_delta,
    score_gradients,
    unit_stride,
    unsupported,
    value_gradient,
    weights_of,
)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are if their strides agree and end in 1, else contiguous: the kernels take one set."""
    if all(x.stride() == tensors[0].stride() for x in tensors) and unit_stride(tensors[0]) is tensors[0]:
        return tensors
    return tuple(x.contiguous() for x in tensors)


def _forward(*args):
    scores, (gate, x, y, softmax), masks, _ = grouped(4, args)
    gate, x, y = _alike(gate, x, y)
    inner, out = x.new_empty(x.shape), x.new_empty(x.shape)
    if out.numel() > 0:
        aggregate(weights_of(scores, softmax, masks), x, inner, gate, y, out, is_gated=True)
    return out, inner


def _backward(needs, grads, saved, *args):
    scores, (gate, x, y, softmax), masks, penalty = grouped(4, args)
    (inner,) = saved
    if inner.numel() == 0:
        tensors = (*scores, gate, x, y)
        zeros = (torch.zeros_like(t) if need else None for t, need in zip(tensors, needs, strict=False))
        return *zeros, None, None, None
    gate, x, y = _alike(gate, x, y)
    grad = unit_stride(grads[0].to(x.dtype))
    weights = weights_of(scores, softmax, masks)
    dinner, dy, values = (x.new_empty(x.shape) for _ in range(3))
    delta = compute_delta(grad, inner, x=x, gate=gate, y=y, inner=dinner, dy=dy, values=values)
    dq, dk, dp, de, _ = score_gradients(weights, (*needs[:4], False), values, dinner, delta, *penalty)
    dx = dgate = None
    if needs[4] or needs[5]:
        dx, dgate = x.new_empty(x.shape), x.new_empty(x.shape)
        value_gradient(weights, x, gate, dinner, dx, dgate, is_gated=True)
    return dq, dk, dp, de, dgate, dx, dy, None, None, None


launchers = Launchers(unsupported, _forward, _backward)
