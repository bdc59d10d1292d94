"""Gated averaging in Triton: a pass for each gate, around the kernels of attention.

The gates are computed once for each element, whatever number of times attention reads a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import cdiv, next_power_of_2, on_device
from zipformer_kernels.ops.attention.scores import Use, grouped
from zipformer_kernels.ops.attention.triton import (
    gated_average,
    scores_gradients,
    unit_stride,
    unsupported,
    values_gradient,
)
from zipformer_kernels.ops.nonlin_attention.gates import GatedLaunchers, Gates

TILE = tuning.entry("nonlin_attention.triton_tile")
CHANNELS = tuning.entry("nonlin_attention.triton_channels")
WARPS = tuning.entry("nonlin_attention.triton_warps")


@triton.jit
def load_tile(ptr, frame, sequence, t, b, c, inside):
    """A tile (rows, channels) of (T, B, C), of frames t and sequences b, in float32."""
    rows = t.to(tl.int64) * frame + b.to(tl.int64) * sequence
    return tl.load(ptr + rows[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


OPEN, CLOSE, CLOSE_BACKWARD, OPEN_BACKWARD = map(tl.constexpr, range(4))


@triton.jit
def store_tile(ptr, frame, sequence, t, b, c, inside, tile):
    """Stores a tile, in the element type of `ptr`, where `load_tile` would load it."""
    rows = t.to(tl.int64) * frame + b.to(tl.int64) * sequence
    tl.store(ptr + rows[:, None] + c[None, :], tile.to(ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "B"])
def gate_kernel(
    a_ptr, a_st, a_sb, b_ptr, b_st, b_sb, c_ptr, c_st, c_sb, first_ptr, first_st, first_sb,
    second_ptr, second_st, second_sb, third_ptr, third_st, third_sb, rows, B, C,
    WHAT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of a tile of frames and sequences, `rows` in all: the function with this name below."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t, s = row // B, row % B
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    a = load_tile(a_ptr, a_st, a_sb, t, s, channel, inside)
    b = load_tile(b_ptr, b_st, b_sb, t, s, channel, inside)
    if WHAT == OPEN:
        first = tanh(a) * b
    if WHAT == CLOSE:
        first = a * b
    if WHAT == CLOSE_BACKWARD:
        first, second = a * load_tile(c_ptr, c_st, c_sb, t, s, channel, inside), a * b
        store_tile(second_ptr, second_st, second_sb, t, s, channel, inside, second)
    if WHAT == OPEN_BACKWARD:
        opened, x = tanh(b), load_tile(c_ptr, c_st, c_sb, t, s, channel, inside)
        first, second = a * x * (1.0 - opened * opened), a * opened
        store_tile(second_ptr, second_st, second_sb, t, s, channel, inside, second)
        store_tile(third_ptr, third_st, third_sb, t, s, channel, inside, x * opened)
    store_tile(first_ptr, first_st, first_sb, t, s, channel, inside, first)


def open_(s: Tensor, x: Tensor) -> Tensor:
    """x tanh(s), contiguous, of (T, B, C) of any strides and one dtype, as in the functions below."""
    return _gate(OPEN, (s, x), x.new_empty(x.shape))


def close(average: Tensor, y: Tensor) -> Tensor:
    """average y, contiguous."""
    return _gate(CLOSE, (average, y), y.new_empty(y.shape))


def close_backward(grad: Tensor, average: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the average, grad y, as that lies in memory; fills dy = grad average."""
    average = unit_stride(average)
    return _gate(CLOSE_BACKWARD, (grad, average, y), torch.empty_like(average), dy)


def open_backward(dvalues: Tensor, s: Tensor, x: Tensor, ds: Tensor, dx: Tensor, values: Tensor | None = None) -> None:
    """Fills the gradients of s, dvalues x (1 - tanh(s)^2), and of x, dvalues tanh(s), and the values, if given."""
    _gate(OPEN_BACKWARD, (dvalues, s, x), ds, dx, torch.empty_like(dx) if values is None else values)


def _gate(what: tl.constexpr, given: tuple[Tensor, ...], *results: Tensor) -> Tensor:
    """Fills the results of a pass, whose channels have stride 1, and returns the first."""
    a, b, c = map(unit_stride, (*given, given[-1])[:3])
    first, second, third = (*results, results[0], results[0])[:3]
    frames, sequences, channels = b.shape
    if first.numel() > 0:
        wide = min(next_power_of_2(channels), CHANNELS.value)
        rows = max(1, TILE.value // wide)
        strides = (x for tensor in (a, b, c, first, second, third) for x in (tensor, *tensor.stride()[:2]))
        with on_device(b):
            gate_kernel[(cdiv(frames * sequences, rows), cdiv(channels, wide))](
                *(*strides, frames * sequences, sequences, channels),
                WHAT=what.value,
                ROWS=rows,
                CHANNELS=wide,
                num_warps=WARPS.value,
            )
    return first


def _forward(*args):
    scores, (gate, x, y, softmax), masks, _ = grouped(4, args)
    values = open_(gate.flatten(2), x.flatten(2)).view(x.shape)
    inner, out = gated_average(scores, softmax, masks, values, y)
    return out, inner


def _backward(needs, grads, saved, *args):
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
    return *dscores, dgate, dx, dy, None, None, None


launchers = GatedLaunchers(unsupported, _forward, _backward, gates=Gates(open_, close, close_backward, open_backward))
