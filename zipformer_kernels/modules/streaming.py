"""The caches that carry left context from one chunk of a stream to the next."""

from __future__ import annotations

import torch
from torch import Tensor


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
    if cache.shape[dim] != length:
        raise ValueError(f"{name}: wanted {length} frames along dimension {dim}, got {tuple(cache.shape)}")
    joined = torch.cat([cache, x], dim=dim)
    return joined, joined.narrow(dim, joined.shape[dim] - length, length)
