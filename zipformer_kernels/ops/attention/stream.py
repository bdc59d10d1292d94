"""The modules that average over a stream's chunk and its left context, whole: reading their weights takes the time."""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.ops.attention.op import _op
from zipformer_kernels.ops.shapes import check_shapes


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
    stream = _op.variants["stream"]
    return stream(src, in_weight, in_bias, context, weights, out_weight, out_bias, gated, backend=backend)
