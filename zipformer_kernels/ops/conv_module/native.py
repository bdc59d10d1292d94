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
    few_rows,
    multiprocessors,
    pointer,
    unsupported_dtypes,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.conv_module.arguments import Arguments, Gradients, chunk_length, unsupported

TILE = 128  # frames that kernels take at a time
BLOCKS_PER_MULTIPROCESSOR = 2
WIDEST = {False: 127, True: 47}  # kernels whose strips fit into the shared memory of every GPU; in chunks


def _forward(call: Callable[..., None], *args: Any) -> tuple[Tensor]:
    arguments = Arguments(*args)
    y = arguments.result()
    if y.numel() > 0:
        call("conv_module_forward", y, _inputs(arguments), pointer(y), arguments.sizes, *_dtypes(arguments))
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
    tensors = x, x[..., channels:], *parameters
    more = y, x_bias, left, None if left is None else following
    sizes = (
        frames,
        batch,
        channels,
        *x.stride()[:2],
        weight.shape[2],
        chunk_length(chunk_size if causal_weight is not None else -1, frames),
    )
    addresses = tuple(map(pointer, tensors)), *map(pointer, more)
    call_cpu("conv_module_infer", x, *addresses, sizes, DTYPE_CODES[x.dtype])
    return y, following


def _stream(*args: Any) -> tuple[Tensor, Tensor]:
    src, in_weight, in_bias, left, weight, *inner, padding, out_weight, out_bias = contiguous(*args)
    frames, batch, channels = src.shape
    y, following = torch.empty_like(src), torch.empty_like(left)
    if y.numel() == 0:
        return y, left.clone()
    sizes = frames, batch, channels, 2 * batch * channels, 2 * channels, weight.shape[2], frames
    call_cpu(
        "conv_module_stream",
        src,
        tuple(map(pointer, (src, in_weight, out_weight, out_bias, y))),
        (0, 0, *map(pointer, (padding, weight, *inner))),
        *map(pointer, (in_bias, left, following)),
        sizes,
        DTYPE_CODES[src.dtype],
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
        pointers = _inputs(arguments), *map(pointer, (dy, out.da, out.ds, out.partials))
        steps = (out.step,) if beside else ()
        call("conv_module_backward", dy, *pointers, out.parts, *steps, arguments.sizes, *_dtypes(arguments))
    return out.returned()


def _inputs(arguments: Arguments) -> tuple[int, ...]:
    tensors = arguments.a, arguments.s, arguments.padding, *arguments.parameters
    return tuple(map(pointer, tensors))


def _dtypes(arguments: Arguments) -> tuple[int, int]:
    return DTYPE_CODES[arguments.a.dtype], DTYPE_CODES[arguments.dtype]


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
    **variants: Launchers,
) -> Launchers:
    backward = partial(_backward, call, most_parts, beside)
    return Launchers(supports, partial(_forward, call), backward, variants=variants)


def _unsupported_infer(x: Tensor, *rest: Any) -> str | None:
    x_bias, left, *parameters = rest[:-2]
    if x.stride(2) != 1 or not all(t is None or t.is_contiguous() for t in (x_bias, left)):
        return "it takes x with channels of stride 1, contiguous x_bias and left"
    return unsupported_dtypes((x, x_bias, left, *parameters), INFERENCE_DTYPES)


# Groups of frames whose gradients of parameters are summed apart: on the CPU so many that threads share them out
# evenly, on the GPU one for each block. The CPU's kernel writes da and ds side by side where a and s lie so.
cpu = _launchers(
    call_cpu,
    partial(unsupported, CPU_DTYPES),
    lambda _: 64,
    beside=True,
    infer=Launchers(_unsupported_infer, _infer, None),
    stream=Launchers(
        lambda *args: unsupported_dtypes(args, INFERENCE_DTYPES), _stream, None, lambda src, *_: few_rows(src)
    ),
)
cuda = _launchers(
    call_cuda,
    _unsupported_cuda,
    lambda arguments: BLOCKS_PER_MULTIPROCESSOR * multiprocessors(arguments.a),
    beside=False,
)
