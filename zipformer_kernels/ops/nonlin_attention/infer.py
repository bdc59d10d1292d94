"""NonlinAttention between its projections in inference, with weights that are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.launch import DTYPE_CODES, call_cpu, unsupported_dtype
from zipformer_kernels.library import Launchers, Op
from zipformer_kernels.ops.attention import merge_heads, split_heads


def infer(projected: Tensor, bias: Tensor | None, weights: Tensor) -> Tensor:
    """The reference, see `infer_nonlin_attention`."""
    s, x, y = (projected if bias is None else projected + bias).chunk(3, dim=2)
    return merge_heads(weights @ split_heads(x * torch.tanh(s), weights.shape[0])) * y


def _eager(*args: Tensor | None) -> tuple[Tensor]:
    return (infer(*args).contiguous(),)


def _cpu(projected: Tensor, bias: Tensor | None, weights: Tensor) -> tuple[Tensor]:
    frames, batch, channels = projected.shape[0], projected.shape[1], projected.shape[2] // 3
    values = projected.new_empty(frames, batch, channels)
    if values.numel() == 0:
        return (values,)
    inputs = projected.data_ptr(), 0 if bias is None else bias.data_ptr()
    sizes = frames, batch, channels, DTYPE_CODES[projected.dtype]
    call_cpu("nonlin_attention_open", projected, *inputs, values.data_ptr(), *sizes)
    average = merge_heads(weights @ split_heads(values, weights.shape[0]))
    strides = average.stride()[:2]
    call_cpu("nonlin_attention_close", projected, *inputs, average.data_ptr(), *strides, values.data_ptr(), *sizes)
    return (values,)


def _unsupported(projected: Tensor, bias: Tensor | None, weights: Tensor) -> str | None:
    if not projected.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return "it takes a contiguous projection and bias"
    others = {t.dtype for t in (bias, weights) if t is not None} - {projected.dtype}
    if others:
        return f"it takes tensors of one dtype, got {projected.dtype} and {others.pop()}"
    return unsupported_dtype(projected, (torch.float32, torch.float64))


op = Op(
    "nonlin_attention_infer",
    "Tensor projected, Tensor? bias, Tensor weights",
    reference=infer,
    backends={"eager": Launchers(lambda *_: None, _eager, None), "cpu": Launchers(_unsupported, _cpu, None)},
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
        backend: which backend to use; see `zipformer_kernels.backend`.
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
    if weights.shape != (heads, batch, frames, frames):
        raise ValueError(f"weights must have shape {(heads, batch, frames, frames)}, got {tuple(weights.shape)}")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias must have shape ({width},), got {tuple(bias.shape)}")
    return op(projected, bias, weights, backend=backend)
