"""NonlinAttention between its projections in inference, with weights that are kept."""

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
from zipformer_kernels.core.op import Launchers, Op
from zipformer_kernels.ops.attention import merge_heads, split_heads
from zipformer_kernels.ops.shapes import check_shapes


class Rows(NamedTuple):
    """`NonlinRows` of ``csrc/nonlin_attention/nonlin_attention.h``."""

    data: int
    frame: int
    sequence: int


NO_ROWS = Rows(0, 0, 0)


def rows(x: Tensor) -> Rows:
    """A tensor (T, batch, channels) with channels of stride 1, for kernels."""
    return Rows(pointer(x), *x.stride()[:2])


def infer(projected: Tensor, bias: Tensor | None, weights: Tensor) -> Tensor:
    """The reference, see `infer_nonlin_attention`."""
    s, x, y = (projected if bias is None else projected + bias).chunk(3, dim=2)
    return merge_heads(weights @ split_heads(x * torch.tanh(s), weights.shape[0])) * y


def _eager(*args: Tensor | None) -> tuple[Tensor]:
    return (infer(*args).contiguous(),)


def _cpu(projected: Tensor, bias: Tensor | None, weights: Tensor) -> tuple[Tensor]:
    frames, batch, width = projected.shape
    if projected.numel() == 0:
        return (projected.new_empty(frames, batch, width // 3),)
    projected, bias = contiguous(projected, bias)
    average = merge_heads(weights @ split_heads(open_(projected, bias), weights.shape[0]))
    return (close(projected, bias, average),)


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


op = Op(
    "nonlin_attention_infer",
    "Tensor projected, Tensor? bias, Tensor weights",
    reference=infer,
    backends={
        "eager": Launchers(lambda *_: None, _eager, None),
        "cpu": Launchers(lambda *args: unsupported_dtypes(args, INFERENCE_DTYPES), _cpu, None),
    },
    saves=(),
    fake=lambda projected, *_: (projected.new_empty(*projected.shape[:2], projected.shape[2] // 3),),
)


def infer_nonlin_attention(
    projected: Tensor, bias: Tensor | None, weights: Tensor, *, backend: str | None = None
) -> Tensor:
    """(W (x tanh(s))) y of the thirds s, x, y of a projection; the result carries no gradient.

    Args:
        projected: (T, batch, 3 channels), less its bias.
        bias: (3 channels,), or None.
        weights: W, (heads, batch, T, T), of one head in the encoder. All of one dtype.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        (T, batch, channels).
    Raises:
        ValueError: a shape does not fit.
        BackendError: `backend` cannot serve the call.
    """
    frames, batch, width = projected.shape
    heads = weights.shape[0]
    if width % (3 * heads):
        raise ValueError(f"projected must have a multiple of {3 * heads} channels, got {tuple(projected.shape)}")
    check_shapes(weights=(weights, (heads, batch, frames, frames)), bias=(bias, (width,)))
    return op(projected, bias, weights, backend=backend)
