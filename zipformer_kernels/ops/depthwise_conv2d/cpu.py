"""depthwise_conv2d with its weight gradient from the compiled module: ``csrc/depthwise_conv2d/cpu.cpp``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import CPU_DTYPES, DTYPE_CODES, call_cpu, like, pointer, unsupported_dtype
from zipformer_kernels.core.op import Launchers

PARTS = tuning.entry("depthwise_conv2d.parts")
PART_FRAMES = tuning.entry("depthwise_conv2d.part_frames")


class Image(NamedTuple):
    """`Image` of ``csrc/depthwise_conv2d/depthwise_conv2d.h``."""

    data: int
    batch_stride: int
    frame_stride: int
    bin_stride: int


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    if x.numel() == 0:
        return (torch.empty_like(x),)
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    y = F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])
    return (like(y, torch.empty_like(x)),)


def _backward(
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[()],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    (dy,) = grads
    dx = dweight = dbias = None
    if needs[0]:
        dx = like(_input_gradient(dy, x, weight), torch.empty_like(x))
    if needs[1]:
        dweight = like(_weight_gradient(dy, x, weight), torch.empty_like(weight))
    if needs[2]:
        wide = torch.promote_types(dy.dtype, torch.float32)
        dbias = like(dy.sum((0, 2, 3), dtype=wide).to(bias.dtype), torch.empty_like(bias))
    return dx, dweight, dbias


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of dy with the kernel turned round, which measured faster than torch's own backward."""
    (dx,) = _forward(dy.to(x.dtype), weight.flip(2, 3), None)
    return dx


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    batch, channels, frames, bins = x.shape
    if x.numel() == 0:
        return torch.zeros_like(weight)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    parts = min(PARTS.value, batch * -(-frames // PART_FRAMES.value))
    kernel = tuple(weight.shape[2:])
    partials = x.new_empty((parts, *kernel, channels), dtype=torch.promote_types(x.dtype, torch.float32))
    images = (Image(pointer(t), t.stride(0), t.stride(2), t.stride(3)) for t in (x, dy))
    sizes = batch, channels, frames, bins, *kernel
    call_cpu("depthwise_conv2d_weight_gradient", x, *images, pointer(partials), parts, *sizes, DTYPE_CODES[x.dtype])
    return partials.sum(0).permute(2, 0, 1).unsqueeze(1).to(weight.dtype)


launchers = Launchers(lambda x, *_: unsupported_dtype(x, CPU_DTYPES), _forward, _backward)
