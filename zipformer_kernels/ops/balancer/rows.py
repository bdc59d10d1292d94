"""How the Balancer's kernels see a tensor: as rows of channels that lie next to each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from zipformer_kernels.core.launch import unsupported_dtypes


def in_rows(x: Tensor, channel_dim: int) -> Tensor:
    """x, copied where it does not lie in rows."""
    if _lies_in_rows(x, channel_dim):
        return x
    return x.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)


def row_stride(x: Tensor, channel_dim: int) -> int | None:
    """From row to row of x, which is dense, or a slice of the channels of such a tensor; None of any other layout."""
    return x.shape[channel_dim] if _lies_in_rows(x, channel_dim) else spacing(x, channel_dim)


def spacing(x: Tensor, channel_dim: int) -> int | None:
    """From row to row of x, whose rows lie in order, the channels last; None of any other layout."""
    sizes, strides = x.shape, x.stride()
    if channel_dim % x.ndim != x.ndim - 1 or x.ndim < 2 or strides[-1] != 1:
        return None
    in_order = all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(x.ndim - 2))
    return strides[-2] if in_order else None


def worthwhile(x: Tensor, channel_dim: int) -> bool:
    """Whether x is read as it is; torch.compile cannot record the question, and fuses the formula itself."""
    return not is_compiling() and _lies_in_rows(x, channel_dim)


def undefined_moments(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Variance and mean of channels without rows."""
    mean = x.new_full((channels,), torch.nan, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean.clone(), mean


def unsupported(
    dtypes: tuple[torch.dtype, ...], grad: Tensor, x: Tensor, variance: Tensor | None, mean: Tensor | None, *_: float
) -> str | None:
    """Why kernels that take `dtypes` cannot take these tensors, or None if they can."""
    reason = unsupported_dtypes((grad, x), dtypes)
    if reason is not None:
        return reason
    return unsupported_dtypes((variance, mean), (torch.promote_types(x.dtype, torch.float32),))


def _lies_in_rows(x: Tensor, channel_dim: int) -> bool:
    """Whether x is dense and its channels lie next to each other: then it is read as it is."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(x)
    return dense and (x.stride(channel_dim) == 1 or x.shape[channel_dim] == 1)
