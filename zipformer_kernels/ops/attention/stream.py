"""The modules that average over a stream's chunk and its left context, whole: reading their weights takes the time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.core.launch import (
    DTYPE_CODES,
    INFERENCE_DTYPES,
    call_cpu,
    contiguous,
    few_rows,
    pointer,
    unsupported_dtypes,
)
from zipformer_kernels.core.op import Launchers, Op
from zipformer_kernels.ops.shapes import check_shapes


def stream(
    src: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    context: Tensor,
    weights: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """The reference, see `stream_attention`."""
    v, g = F.linear(src, in_weight, in_bias), None
    if gated:
        s, x, g = v.chunk(3, dim=2)
        v = x * s.tanh()
    joined = torch.cat([context, v])
    by_head = joined.unflatten(2, (weights.shape[0], -1)).permute(2, 1, 0, 3)
    average = (weights @ by_head).permute(2, 1, 0, 3).flatten(2)
    return src + F.linear(average if g is None else average * g, out_weight, out_bias), joined


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, gated = args
    src, in_weight, in_bias, context, weights, *after = contiguous(*tensors)
    targets, batch, channels = src.shape
    heads, _, _, sources = weights.shape
    values = context.shape[2]
    y, joined = torch.empty_like(src), src.new_empty(sources, batch, values)
    if y.numel() == 0:
        joined[: context.shape[0]].copy_(context)
        return y, joined
    call_cpu(
        "average_branch",
        src,
        *map(pointer, (src, in_weight, in_bias, *after, y)),
        channels,
        DTYPE_CODES[src.dtype],
        targets=targets,
        sources=sources,
        sequences=batch,
        heads=heads,
        values=values,
        gated=gated,
        context=pointer(context),
        weights=pointer(weights),
        joined=pointer(joined),
    )
    return y, joined


def _fake(src: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    context, weights = rest[2:4]
    return torch.empty_like(src), src.new_empty(weights.shape[3], src.shape[1], context.shape[2])


op = Op(
    "attention_stream",
    "Tensor src, Tensor in_weight, Tensor? in_bias, Tensor context, Tensor weights, Tensor out_weight, "
    "Tensor? out_bias, bool gated",
    reference=stream,
    backends={
        "eager": Launchers(lambda *_: None, stream, None),
        "cpu": Launchers(
            supports=lambda *args: unsupported_dtypes(args[:-1], INFERENCE_DTYPES),
            forward=_cpu,
            backward=None,
            worthwhile=lambda src, *_: few_rows(src),
        ),
    },
    saves=(),
    outputs=2,
    fake=_fake,
)


def stream_attention(
    src: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    context: Tensor,
    weights: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    gated: bool,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """src + linear(the average of linear(src) with given weights), of a chunk of a stream; results carry no gradient.

    Where `gated`, values are x tanh(s) and averages are multiplied by y, of the thirds s, x, y of linear(src).

    Args:
        src: (T, batch, channels). ``auto`` takes the kernel for few rows, see `zipformer_kernels.core.launch.few_rows`.
        in_weight: (V, channels), or (3 V, channels) where `gated`.
        in_bias: (V,) or (3 V,); or None.
        context: (L, batch, V), the values of the frames before src.
        weights: (heads, batch, T, L + T); V is a multiple of the heads.
        out_weight: (channels, V).
        out_bias: (channels,), or None. All of one dtype.
        gated: whether the module is NonlinAttention.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        (T, batch, channels); and the values, (L + T, batch, V), the context first.
    Raises:
        ValueError: a shape does not fit.
        BackendError: `backend` cannot serve the call.
    """
    frames, batch, channels = src.shape
    length, _, values = context.shape
    rows = 3 * values if gated else values
    check_shapes(
        in_weight=(in_weight, (rows, channels)),
        in_bias=(in_bias, (rows,)),
        context=(context, (length, batch, values)),
        weights=(weights, (weights.shape[0], batch, frames, length + frames)),
        out_weight=(out_weight, (channels, values)),
        out_bias=(out_bias, (channels,)),
    )
    if values % weights.shape[0]:
        raise ValueError(
            f"context must have a multiple of {weights.shape[0]} heads' values, got {tuple(context.shape)}"
        )
    return op(src, in_weight, in_bias, context, weights, out_weight, out_bias, gated, backend=backend)
