"""Tensors as the CUDA kernels of attention read them: rows of channels that are copied many bytes at a time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.ops.attention.scores import Scores

COPIED = 16
"""Bytes of the longest copy, which rows of queries and keys, and of wide values, are aligned to."""

GROUP = 4
"""Elements that all other rows are aligned to: the position channels, and a third of the value channels of a head."""

NARROW = 16
"""Value channels of a head up to which values are narrow."""


def aligned(x: Tensor, channels: int, elements: int) -> Tensor:
    """x, (..., c), or a copy with zeros beyond its channels, so that kernels can read it.

    Args:
        x: a tensor of at most `channels` channels.
        channels: how many the result has.
        elements: of these all rows begin at multiples in memory.
    """
    if x.shape[-1] != channels:
        return F.pad(x, (0, channels - x.shape[-1]))
    *strides, last = x.stride()
    if last == 1 and x.data_ptr() % (elements * x.element_size()) == 0:
        for size, stride in zip(x.shape, strides, strict=False):
            if stride % elements and size > 1:
                break
        else:
            return x
    return x.clone() if x.is_contiguous() else x.contiguous()


def cut(x: Tensor, channels: int) -> Tensor:
    """The first channels of x, contiguous."""
    return x if x.shape[-1] == channels else x[..., :channels].contiguous()


def aligned_scores(scores: Scores) -> Scores:
    """q and k with a multiple of 8 channels in rows of 16 bytes, p and e with 4 channels; zeros where they are None."""
    q, k, p, e = scores
    channels, elements = whole_groups(q.shape[3], 8), COPIED // q.element_size()
    if p is None:  # rare: of constant weights, and where a model skips positions at random
        zeros, (targets, batch, heads, _) = q.new_zeros(GROUP), q.shape
        p = zeros.expand(targets, batch, heads, GROUP)
        e = zeros.expand(targets + k.shape[0] - 1, heads, GROUP)
    return Scores(
        *(aligned(x, channels, elements) for x in (q, k)),
        *(aligned(x, GROUP, GROUP) for x in (p, e)),
    )


def aligned_values(x: Tensor) -> Tensor:
    """Values, results, or their gradients, (frames, B, H, C); narrow ones in groups of 4 channels, else 16 bytes."""
    elements = GROUP if x.shape[3] <= NARROW else COPIED // x.element_size()
    return aligned(x, whole_groups(x.shape[3], elements), elements)


def whole_groups(count: int, size: int) -> int:
    """The lowest multiple of `size` that is not below `count`."""
    return -(-count // size) * size
