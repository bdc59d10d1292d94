"""The Balancer's gradient through the compiled module: ``csrc/balancer/cpu.cpp``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.autograd import backward_of
from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    call_cpu,
    contiguous,
    like,
    pointer,
    unsupported_dtype,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.balancer.reference import balanced_gradient
from zipformer_kernels.ops.balancer.rows import in_rows, undefined_moments, unsupported, worthwhile

PARTS = tuning.entry("balancer.parts")
PART_ROWS = tuning.entry("balancer.part_rows")


def _forward(
    grad: Tensor, x: Tensor, variance: Tensor | None, mean: Tensor | None, channel_dim: int, *limits: float
) -> tuple[Tensor]:
    if x.numel() == 0:
        return (torch.empty_like(x),)
    rows = in_rows(x, channel_dim)
    if variance is None or mean is None:
        variance, mean = _moments(rows, channel_dim)
    grad, out = like(grad, rows), torch.empty_like(rows)
    mean, variance = contiguous(mean, variance)  # kept here until the call is over
    addresses = map(pointer, (grad, rows, mean, variance, out))
    channels = x.shape[channel_dim]
    call_cpu("balancer_gradient", x, *addresses, limits, x.numel() // channels, channels, DTYPE_CODES[x.dtype])
    return (like(out, torch.empty_like(x)),)


def _moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Variance, by N, and mean of each channel, (channels,), in float32 (float64 for float64)."""
    channels, wide = x.shape[channel_dim], torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return undefined_moments(x, channels)
    x = in_rows(x, channel_dim)
    rows = x.numel() // channels
    parts = max(1, min(PARTS.value, rows // PART_ROWS.value))
    mean, variance = (x.new_empty(channels, dtype=wide) for _ in range(2))
    partials = x.new_empty((parts, 2, channels), dtype=wide)
    addresses = map(pointer, (x, mean, variance, partials))
    call_cpu("balancer_moments", x, *addresses, rows, channels, parts, DTYPE_CODES[x.dtype])
    return variance, mean


launchers = Launchers(
    partial(unsupported, CPU_DTYPES),
    _forward,
    backward_of(balanced_gradient),
    lambda grad, x, variance, mean, channel_dim, *_: worthwhile(x, channel_dim),
    variants={
        "moments": Launchers(lambda x, _: unsupported_dtype(x, CPU_DTYPES), _moments, None, worthwhile),
    },
)
