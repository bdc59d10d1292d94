"""Swoosh in Triton: one elementwise pass forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.launch import GPU_DTYPES, cdiv, dense, like, on_device, unsupported_dtype
from zipformer_kernels.library import Launchers
from zipformer_kernels.ops.swoosh.reference import OFFSET, SHIFT

BLOCK = 1024
WARPS = 4


@triton.jit
def softplus(u):
    """log(1 + exp(u)) in float32, finite for every finite u."""
    return tl.maximum(u, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(u)))


@triton.jit
def swoosh_value(x, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """log(1 + exp(x - shift)) - 0.08 x - offset, for x in float32."""
    return softplus(x - SHIFT) - 0.08 * x - OFFSET


@triton.jit
def swoosh_derivative(x, SHIFT: tl.constexpr):
    """sigmoid(x - shift) - 0.08, for x in float32."""
    return tl.sigmoid(x - SHIFT) - 0.08


@triton.jit
def forward_kernel(x_ptr, y_ptr, n, SHIFT: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
    y = swoosh_value(x, SHIFT, OFFSET)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def backward_kernel(dy_ptr, x_ptr, dx_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + i, inside, other=0.0).to(tl.float32)
    dx = dy * swoosh_derivative(x, SHIFT)
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), inside)


def _forward(x: Tensor, kind: str) -> tuple[Tensor]:
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            grid = (cdiv(x.numel(), BLOCK),)
            forward_kernel[grid](x, y, x.numel(), SHIFT[kind], OFFSET[kind], BLOCK, num_warps=WARPS)
    return (y,)


def _backward(needs: tuple, grads: tuple, saved: tuple, x: Tensor, kind: str) -> tuple[Tensor]:
    x = dense(x)
    dy = like(grads[0], x)
    dx = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            grid = (cdiv(x.numel(), BLOCK),)
            backward_kernel[grid](dy, x, dx, x.numel(), SHIFT[kind], BLOCK, num_warps=WARPS)
    return (dx,)


launchers = Launchers(lambda x, kind: unsupported_dtype(x, GPU_DTYPES), _forward, _backward)
