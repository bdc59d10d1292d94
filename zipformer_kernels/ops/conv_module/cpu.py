"""conv_module on the CPU: ``csrc/conv_module/cpu.cpp``, and kernels for calls without gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    INFERENCE_DTYPES,
    call_cpu,
    contiguous,
    few_rows,
    pointer,
    unsupported_dtypes,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.conv_module.arguments import Arguments, Gradients, Shape, chunk_length, unsupported
from zipformer_kernels.ops.conv_module.native import inputs

PARTS = tuning.entry("conv_module.parts")
PART_FRAMES = tuning.entry("conv_module.part_frames")


def _forward(*args: Any) -> tuple[Tensor]:
    arguments = Arguments(*args)
    y = arguments.result()
    if y.numel() > 0:
        call_cpu("conv_module_forward", y, **inputs(arguments), y=pointer(y))
    return (y,)


def _backward(needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], *args: Any) -> tuple[Tensor | None, ...]:
    arguments = Arguments(*args)
    dy = grads[0].contiguous()
    out = Gradients(arguments, needs, arguments.parts(PART_FRAMES.value, PARTS.value))
    if dy.numel() > 0:
        call_cpu(
            "conv_module_backward",
            dy,
            **inputs(arguments),
            dy=pointer(dy),
            da=pointer(out.da),
            ds=pointer(out.ds),
            partials=pointer(out.partials),
            parts=out.parts,
            gradient_step=out.step,
        )
    return out.returned()


def _infer(
    x: Tensor,
    x_bias: Tensor | None,
    left: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor | None,
    causal_bias: Tensor | None,
    edge_scale: Tensor | None,
    padding: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunks of a stream are small and come often: arguments are taken as they are, see `_unsupported_infer`."""
    frames, batch, channels = x.shape[0], x.shape[1], x.shape[2] // 2
    y = x.new_empty(frames, batch, channels)
    following = x.new_empty(0) if left is None else torch.empty_like(left)
    if y.numel() == 0:
        return y, following if left is None else left.clone()
    x_bias, left = contiguous(x_bias, left)
    parameters = contiguous(padding, weight, bias, causal_weight, causal_bias, edge_scale)
    chunk = chunk_length(chunk_size if causal_weight is not None else -1, frames)
    dtype = DTYPE_CODES[x.dtype]
    call_cpu(
        "conv_module_infer",
        x,
        *map(pointer, (x, x[..., channels:], *parameters)),
        shape=Shape(frames, batch, channels, *x.stride()[:2], weight.shape[2], chunk),
        x_dtype=dtype,
        y_dtype=dtype,
        y=pointer(y),
        left=pointer(left),
        projection_bias=pointer(x_bias),
        next=pointer(None if left is None else following),
        swoosh=True,
    )
    return y, following


def _unsupported_infer(x: Tensor, *rest: Any) -> str | None:
    x_bias, left, *parameters = rest[:-2]
    if x.stride(2) != 1 or not all(t is None or t.is_contiguous() for t in (x_bias, left)):
        return "it takes x with channels of stride 1, contiguous x_bias and left"
    return unsupported_dtypes((x, x_bias, left, *parameters), INFERENCE_DTYPES)


def _stream(*args: Any) -> tuple[Tensor, Tensor]:
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


launchers = Launchers(
    partial(unsupported, CPU_DTYPES),
    _forward,
    _backward,
    variants={
        "infer": Launchers(_unsupported_infer, _infer, None),
        "stream": Launchers(
            lambda *args: unsupported_dtypes(args, INFERENCE_DTYPES), _stream, None, lambda src, *_: few_rows(src)
        ),
    },
)
