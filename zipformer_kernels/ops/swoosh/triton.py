"""Swoosh in Triton: one elementwise pass forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import GPU_DTYPES, cdiv, dense, like, on_device, unsupported_dtype
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.swoosh.reference import OFFSET, SHIFT

BLOCK = tuning.entry("swoosh.triton_block")
WARPS = tuning.entry("swoosh.triton_warps")


@triton.jit
def log1p_unit(z):
    """log(1 + z) for 0 <= z <= 1, within 2.3e-7 relative, by the polynomial of csrc/common/math.h.

    The logarithm of 1 + z would take four times as many instructions by CUDA's library, and by the hardware's log2 have
    an absolute error of 1.7e-7, however small z is.
    """
    q = 5.126102362e-3 * z - 2.907406539e-2
    q = q * z + 7.751608640e-2
    q = q * z - 1.360224783e-1
    q = q * z + 1.907688081e-1
    q = q * z - 2.483539879e-1
    q = q * z + 3.331812024e-1
    q = q * z - 4.999944568e-1
    q = q * z + 0.9999999404
    return q * z


@triton.jit
def decay(u):
    """exp(-|u|) in float32, from 0 to 1. By exp2 it is two instructions; exp would look after what is below 1e-38."""
    return tl.exp2(tl.abs(u) * -1.4426950408889634)


@triton.jit
def softplus(u):
    """log(1 + exp(u)) in float32, finite for every finite u."""
    return tl.maximum(u, 0.0) + log1p_unit(decay(u))


@triton.jit
def sigmoid(u):
    """1 / (1 + exp(-u)) in float32, within 3e-7 relative, from the same exponential as `softplus`.

    The reciprocal is the square of a reciprocal root, two instructions: a division would take eight.
    """
    z = decay(u)
    root = tl.rsqrt(1.0 + z)
    return tl.where(u > 0.0, 1.0, z) * (root * root)


@triton.jit
def swoosh_value(x, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """log(1 + exp(x - shift)) - 0.08 x - offset, for x in float32."""
    return softplus(x - SHIFT) - 0.08 * x - OFFSET


@triton.jit
def swoosh_derivative(x, SHIFT: tl.constexpr):
    """sigmoid(x - shift) - 0.08, for x in float32."""
    return sigmoid(x - SHIFT) - 0.08


@jit
def forward_kernel(x_ptr, y_ptr, n, SHIFT: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
    y = swoosh_value(x, SHIFT, OFFSET)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), inside)


@jit
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
            block = BLOCK.value
            grid = (cdiv(x.numel(), block),)
            forward_kernel[grid](x, y, x.numel(), SHIFT[kind], OFFSET[kind], block, num_warps=WARPS.value)
    return (y,)


def _backward(needs: tuple, grads: tuple, saved: tuple, x: Tensor, kind: str) -> tuple[Tensor]:
    x = dense(x)
    dy = like(grads[0], x)
    dx = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            block = BLOCK.value
            grid = (cdiv(x.numel(), block),)
            backward_kernel[grid](dy, x, dx, x.numel(), SHIFT[kind], block, num_warps=WARPS.value)
    return (dx,)


launchers = Launchers(lambda x, kind: unsupported_dtype(x, GPU_DTYPES), _forward, _backward)
