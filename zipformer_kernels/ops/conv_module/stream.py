"""The whole convolution module on a stream's chunk, which is so small that reading the weights takes the time."""

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
from zipformer_kernels.ops.conv_module import reference
from zipformer_kernels.ops.shapes import as_mask, check_shapes


def stream(
    src: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    left: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor,
    causal_bias: Tensor | None,
    edge_scale: Tensor,
    padding: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The reference: `reference.infer` between the projections, added to src; and the next `left`."""
    parameters = weight, bias, causal_weight, causal_bias, edge_scale
    x = F.linear(src, in_weight)
    x, following = reference.infer(x, in_bias, left, *parameters, padding, max(src.shape[0], 1))
    return src + F.linear(x, out_weight, out_bias), following


def _eager(*args: Any) -> tuple[Tensor, Tensor]:
    y, following = stream(*args)
    return y, following.contiguous()


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    src, in_weight, in_bias, left, weight, *inner, padding, out_weight, out_bias = contiguous(*args)
    frames, batch, channels = src.shape
    y, following = torch.empty_like(src), torch.empty_like(left)
    if y.numel() == 0:
        return y, left.clone()
    call_cpu(
        "convolution_branch",
        src,
        *map(pointer, (src, in_weight, in_bias, out_weight, out_bias, y)),
        channels,
        DTYPE_CODES[src.dtype],
        frames,
        batch,
        weight.shape[2],
        *map(pointer, (padding, weight, *inner)),
        left=pointer(left),
        next=pointer(following),
    )
    return y, following


op = Op(
    "conv_module_stream",
    "Tensor src, Tensor in_weight, Tensor? in_bias, Tensor left, Tensor weight, Tensor? bias, Tensor causal_weight, "
    "Tensor? causal_bias, Tensor edge_scale, Tensor? padding, Tensor out_weight, Tensor? out_bias",
    reference=stream,
    backends={
        "eager": Launchers(lambda *_: None, _eager, None),
        "cpu": Launchers(
            lambda *args: unsupported_dtypes(args, INFERENCE_DTYPES), _cpu, None, lambda src, *_: few_rows(src)
        ),
    },
    saves=(),
    outputs=2,
    fake=lambda src, in_weight, in_bias, left, *_: (torch.empty_like(src), left.new_empty(left.shape)),
)


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
    return op(*args, key_padding_mask, out_weight, out_bias, backend=backend)
