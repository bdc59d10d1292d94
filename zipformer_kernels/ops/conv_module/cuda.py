"""conv_module on NVIDIA GPUs: the ``*.cu`` of ``csrc/conv_module``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import GPU_DTYPES, call_cuda, cdiv, multiprocessors, pointer
from zipformer_kernels.ops.conv_module.arguments import Arguments, unsupported
from zipformer_kernels.ops.conv_module.native import inputs
from zipformer_kernels.ops.conv_module.passes import Outputs, Passes
from zipformer_kernels.ops.conv_module.sums import Sums

BLOCKS_PER_MULTIPROCESSOR = tuning.entry("conv_module.cuda_blocks")
WIDEST = {False: 127, True: 47}  # kernels whose strips fit into the shared memory of every GPU; in chunks
WIDEST_FRAME = 2**31 // 4  # elements of all sequences and both halves


def _unsupported(a: Tensor, s: Tensor, weight: Tensor, *rest: Any) -> str | None:
    widest = WIDEST[rest[1] is not None]
    if weight.shape[2] > widest:
        return f"it takes kernels of up to {widest} frames, got {weight.shape[2]}"
    frame = max(2 * a.shape[1:].numel(), a.stride(0), s.stride(0))
    if frame > WIDEST_FRAME:
        return f"it takes frames of up to {WIDEST_FRAME} elements, got {frame}"
    return unsupported(GPU_DTYPES, a, s, weight, *rest)


def _forward(arguments: Arguments, y: Tensor | None, activated: Tensor | None, x_bias: Tensor | None) -> None:
    outputs = {"y": pointer(y), "activated": pointer(activated), "projection_bias": pointer(x_bias)}
    call_cuda("conv_module_forward", arguments.a, **inputs(arguments), **outputs)


def _backward(arguments: Arguments, dy: Tensor, y: Tensor | None, outputs: Outputs, found: Sums) -> Tensor:
    sums, parts = found.empty(), _parts(arguments)
    partials = found.partials(parts) if found.rows else None
    call_cuda(
        "conv_module_backward",
        dy,
        **inputs(arguments),
        dy=pointer(dy),
        da=pointer(outputs.da),
        ds=pointer(outputs.ds),
        partials=pointer(partials),
        parts=parts,
        gradient_step=outputs.step,
        y=pointer(y),
        activated=pointer(outputs.activated),
        sums=pointer(sums),
        parameters=found.parameters,
    )
    return sums


def _parts(arguments: Arguments) -> int:
    """Groups of frames whose sums are taken apart: so many that all blocks run at once."""
    channels = 32 * (2 if arguments.a.element_size() == 2 and not arguments.chunked else 1)
    across = cdiv(arguments.a.shape[2], channels)
    return max(1, BLOCKS_PER_MULTIPROCESSOR.value * multiprocessors(arguments.a) // across)


launchers = Passes(_forward, _backward, _unsupported).launchers()
