"""The Balancer's gradient through the compiled module: ``csrc/balancer/cpu.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core import backend, tuning
from zipformer_kernels.core.call import plain
from zipformer_kernels.core.launch import CPU_DTYPES, DTYPE_CODES, call_cpu, contiguous, like, pointer

PARTS = tuning.entry("balancer.parts")
PART_ROWS = tuning.entry("balancer.part_rows")


def serves(x: Tensor, channel_dim: int, *others: Tensor) -> bool:
    """Whether the kernels can take x: on the CPU, dense, its channels next to each other; and others of its dtype.

    All must be plain, and nobody may look on.
    """
    if x.device.type != "cpu" or x.dtype not in CPU_DTYPES or torch.is_grad_enabled() or not plain(x, *others):
        return False
    if any(other.dtype != x.dtype for other in others):
        return False
    if backend.missing["cpu"] is not None or backend.requested().split(",")[0] not in ("auto", "cpu"):
        return False
    dense = torch.ops.aten.is_non_overlapping_and_dense(x)
    return x.numel() > 0 and dense and (x.stride(channel_dim) == 1 or x.shape[channel_dim] == 1)


def moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Variance, by N, and mean of each channel, (channels,), in float32 (float64 for float64)."""
    channels = x.shape[channel_dim]
    rows = x.numel() // channels
    parts = max(1, min(PARTS.value, rows // PART_ROWS.value))
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, variance = (x.new_empty(channels, dtype=wide) for _ in range(2))
    partials = x.new_empty((parts, 2, channels), dtype=wide)
    addresses = map(pointer, (x, mean, variance, partials))
    call_cpu("balancer_moments", x, *addresses, rows, channels, parts, DTYPE_CODES[x.dtype])
    return variance, mean


def gradient(
    grad: Tensor, x: Tensor, variance: Tensor, mean: Tensor, channel_dim: int, limits: tuple[float, ...]
) -> Tensor:
    """`zipformer_kernels.training.balancer.balanced_gradient` from the moments of x.

    Args:
        grad, x: of one shape and dtype.
        variance, mean: (channels,), as `moments` gives them.
        channel_dim: the dimension of the channels.
        limits: min_mean, max_mean, min_rms, max_rms and grad_scale.
    """
    grad, out = like(grad, x), torch.empty_like(x)
    mean, variance = contiguous(mean, variance)  # kept here until the call is over
    addresses = map(pointer, (grad, x, mean, variance, out))
    channels = x.shape[channel_dim]
    call_cpu("balancer_gradient", x, *addresses, limits, x.numel() // channels, channels, DTYPE_CODES[x.dtype])
    return out
