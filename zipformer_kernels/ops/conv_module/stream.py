"""The whole convolution module on a stream's chunk, which is so small that reading the weights takes the time."""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.ops.conv_module import _op
from zipformer_kernels.ops.shapes import as_mask, check_shapes


def stream_conv_module(
    src: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    left: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor,
    causal_bias: Tensor | None,
    edge_scale: Tensor,
    key_padding_mask: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """src + linear(`infer_conv_module` of linear(src)), of one chunk of a stream; results carry no gradient.

    Args:
        src: (T, batch, channels), the whole chunk. ``auto`` takes the kernel for few rows, see
            `zipformer_kernels.core.launch.few_rows`.
        in_weight: (2 channels, channels).
        in_bias: (2 channels,), or None.
        left: (batch, channels, K // 2), the gated input of the frames before src.
        weight, bias, causal_weight, causal_bias, edge_scale, key_padding_mask: as of `chunk_conv_module`.
        out_weight: (channels, channels).
        out_bias: (channels,), or None. All of one dtype.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        (T, batch, channels), and `left` for the next chunk.
    Raises:
        ValueError: a shape does not fit.
        BackendError: `backend` cannot serve the call.
    """
    frames, batch, channels = src.shape
    taps = weight.shape[2]
    key_padding_mask = as_mask("key_padding_mask", key_padding_mask)
    check_shapes(
        in_weight=(in_weight, (2 * channels, channels)),
        in_bias=(in_bias, (2 * channels,)),
        left=(left, (batch, channels, taps // 2)),
        weight=(weight, (channels, 1, taps)),
        bias=(bias, (channels,)),
        causal_weight=(causal_weight, (channels, 1, taps // 2 + 1)),
        causal_bias=(causal_bias, (channels,)),
        edge_scale=(edge_scale, (2, channels, taps)),
        key_padding_mask=(key_padding_mask, (batch, frames)),
        out_weight=(out_weight, (channels, channels)),
        out_bias=(out_bias, (channels,)),
    )
    args = src, in_weight, in_bias, left, weight, bias, causal_weight, causal_bias, edge_scale
    return _op.variants["stream"](*args, key_padding_mask, out_weight, out_bias, backend=backend)
