"""conv_module through the compiled module: ``cpu.cpp`` and ``cuda.cu`` of ``csrc/conv_module/``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    GPU_DTYPES,
    INFERENCE_DTYPES,
    call_cpu,
    call_cuda,
    contiguous,
    multiprocessors,
    pointer,
    unsupported_dtypes,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.conv_module.arguments import Arguments, Gradients, Shape, chunk_length, unsupported

TILE = 128  # frames that kernels take at a time
BLOCKS_PER_MULTIPROCESSOR = 2
WIDEST = {False: 127, True: 47}  # kernels whose strips fit into the shared memory of every GPU; in chunks


def _forward(call: Callable[..., None], *args: Any) -> tuple[Tensor]:
    arguments = Arguments(*args)
    y = arguments.result()
    if y.numel() > 0:
        call("conv_module_forward", y, **_inputs(arguments), y=pointer(y))
    return (y,)


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


def _backward(
    call: Callable[..., None],
    most_parts: Callable[[Arguments], int],
    beside: bool,
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[()],
    *args: Any,
) -> tuple[Tensor | None, ...]:
    arguments = Arguments(*args)
    dy = grads[0].contiguous()
    out = Gradients(arguments, needs, arguments.parts(TILE, most_parts(arguments)), beside)
    if dy.numel() > 0:
        call(
            "conv_module_backward",
            dy,
            **_inputs(arguments),
            dy=pointer(dy),
            da=pointer(out.da),
            ds=pointer(out.ds),
            partials=pointer(out.partials),
            parts=out.parts,
            gradient_step=out.step,
        )
    return out.returned()


INPUTS = "a", "s", "padding", "weight", "bias", "causal_weight", "causal_bias", "edge_scale"


def _inputs(arguments: Arguments) -> dict[str, Any]:
    """`ConvModuleInputs` of ``csrc/conv_module/conv_module.h``."""
    tensors = arguments.a, arguments.s, arguments.padding, *arguments.parameters
    dtypes = {"x_dtype": DTYPE_CODES[arguments.a.dtype], "y_dtype": DTYPE_CODES[arguments.dtype]}
    return {**dict(zip(INPUTS, map(pointer, tensors), strict=True)), "shape": arguments.shape, **dtypes}


def _unsupported_cuda(a: Tensor, s: Tensor, weight: Tensor, *rest: Any) -> str | None:
    widest = WIDEST[rest[1] is not None]
    if weight.shape[2] > widest:
        return f"it takes kernels of up to {widest} frames, got {weight.shape[2]}"
    return unsupported(GPU_DTYPES, a, s, weight, *rest)


def _launchers(
    call: Callable[..., None],
    supports: Callable[..., str | None],
    most_parts: Callable[[Arguments], int],
    beside: bool,
) -> Launchers:
    return Launchers(supports, partial(_forward, call), partial(_backward, call, most_parts, beside))


def _unsupported_infer(x: Tensor, *rest: Any) -> str | None:
    x_bias, left, *parameters = rest[:-2]
    if x.stride(2) != 1 or not all(t is None or t.is_contiguous() for t in (x_bias, left)):
        return "it takes x with channels of stride 1, contiguous x_bias and left"
    return unsupported_dtypes((x, x_bias, left, *parameters), INFERENCE_DTYPES)


cpu_infer = Launchers(_unsupported_infer, _infer, None)

# Groups of frames whose gradients of parameters are summed apart: on the CPU so many that threads share them out
# evenly, on the GPU one for each block. The CPU's kernel writes da and ds side by side where a and s lie so.
cpu = _launchers(call_cpu, partial(unsupported, CPU_DTYPES), lambda _: 64, beside=True)
cuda = _launchers(
    call_cuda,
    _unsupported_cuda,
    lambda arguments: BLOCKS_PER_MULTIPROCESSOR * multiprocessors(arguments.a),
    beside=False,
)
