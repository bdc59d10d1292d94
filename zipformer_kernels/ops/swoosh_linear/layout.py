"""How a mask lies over x: the three sizes that kernels of swoosh_linear see."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """x as (outer, shared, inner), and its mask as (outer, inner): contiguous, in float32 or better.

    Without a mask inner are the channels and shared everything else, with outer 1.
    """

    mask: Tensor | None
    outer: int
    shared: int
    inner: int


def layout(x: Tensor, mask: Tensor | None) -> Layout:
    """The layout of a mask that broadcasts to x; one that is shared in other ways is expanded first."""
    if mask is None:
        return Layout(None, 1, x.numel() // max(x.shape[-1], 1), x.shape[-1])
    mask = mask.to(torch.promote_types(x.dtype, torch.float32))
    sizes = (1,) * (x.ndim - mask.ndim) + mask.shape
    shared = [i for i, (size, full) in enumerate(zip(sizes, x.shape, strict=True)) if size != full]
    if not shared:
        return Layout(mask.contiguous(), 1, 1, x.numel())
    first, end = shared[0], shared[-1] + 1
    inner = prod(x.shape[end:])
    if inner == 1 or prod(sizes[first:end]) != 1:
        return Layout(mask.expand(x.shape).contiguous(), 1, 1, x.numel())
    return Layout(mask.contiguous(), prod(x.shape[:first]), prod(x.shape[first:end]), inner)
