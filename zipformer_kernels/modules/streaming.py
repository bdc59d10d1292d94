"""What carries left context from one chunk of a stream to the next, and modules that take a chunk in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.core.op import SettledBackend
from zipformer_kernels.ops.attention import AttentionWeights
from zipformer_kernels.ops.attention.stream import stream_attention


def join_cache(name: str, cache: Tensor, x: Tensor, length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Puts the cached left context before x along time.

    Args:
        name: what to call the cache in an error.
        cache: the last `length` frames before x.
        x: the new frames.
        length: frames of left context.
        dim: the dimension of time.

    Returns:
        The joined frames, and the last `length` of them: the cache for the next chunk.

    Raises:
        ValueError: the cache has not `length` frames.
    """
    check_cache(name, cache, length, dim)
    joined = torch.cat([cache, x], dim=dim)
    return joined, joined.narrow(dim, joined.shape[dim] - length, length)


def check_cache(name: str, cache: Tensor, length: int, dim: int) -> None:
    """Raises ValueError unless the cache has `length` frames along a dimension."""
    if cache.shape[dim] != length:
        raise ValueError(f"{name}: wanted {length} frames along dimension {dim}, got {tuple(cache.shape)}")


def average_chunk(
    backend: SettledBackend,
    branch: Branch,
    src: Tensor,
    attn_weights: AttentionWeights | Tensor,
    cache: Tensor,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """src + branch(src), without gradients.

    Args:
        backend: that was settled.
        branch: SelfAttention, or, `gated`, NonlinAttention.
        src: (T, batch, channels), with few rows.
        attn_weights: (heads, batch, T, L + T).
        cache: (L, batch, values).
        gated: which of the two it is.

    Returns:
        (T, batch, channels), and the next `cache`.
    """
    weights = attn_weights if isinstance(attn_weights, Tensor) else attn_weights.materialize()
    first, last = branch.in_proj, branch.out_proj
    tensors = first.weight, first.bias, cache, weights, last.weight, last.bias
    src, joined = stream_attention(src, *tensors, gated, backend=backend)
    return src, joined[joined.shape[0] - cache.shape[0] :]
