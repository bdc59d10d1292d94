"""Parts of a projection, side by side in one tensor, and gradients that are written so.

Autograd copies the gradients of a split together. Kernels that write them side by side make that copy needless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core.call import plain, unreadable


def side_by_side(*parts: Tensor | None) -> Tensor | None:
    """The tensor (T, batch, channels) that parts of its channels, in order, fill; or None if they do not.

    Args:
        parts: (T, batch, ...), whose further dimensions lie next to each other in memory.
    """
    first = parts[0]
    if any(x is None or x.numel() == 0 for x in parts) or unreadable(parts) is not None:
        return None
    frames, batch = first.shape[:2]
    widths = [x.shape[2:].numel() for x in parts]
    strides = batch * sum(widths), sum(widths), 1
    offset, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    for x, width in zip(parts, widths, strict=True):
        rows = x.stride()[:2] == strides[:2] and x.stride()[2:] == _dense_strides(x.shape[2:])
        same = x.shape[:2] == first.shape[:2] and x.dtype == first.dtype and x.untyped_storage().data_ptr() == memory
        if not rows or not same or x.storage_offset() != offset:
            return None
        offset += width
    return first.as_strided((frames, batch, strides[1]), strides)


def empty_beside(*parts: Tensor) -> list[Tensor]:
    """Uninitialised tensors shaped as the parts, side by side where those are."""
    joint = side_by_side(*parts)
    if joint is None:
        return [torch.empty_like(x) for x in parts]
    pieces = torch.empty_like(joint).split([x.shape[2:].numel() for x in parts], dim=2)
    return [piece.unflatten(2, x.shape[2:]) for piece, x in zip(pieces, parts, strict=True)]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.widths = widths
        ctx.set_materialize_grads(False)
        return x.split(widths, dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        # Gradients that are to be differentiated come from `cat`: `side_by_side` hides where they are from.
        joint = None if torch.is_grad_enabled() else side_by_side(*grads)
        if joint is not None:
            return joint, None
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return None, None
        pieces = [
            given.new_zeros(*given.shape[:2], width) if grad is None else grad
            for grad, width in zip(grads, ctx.widths, strict=True)
        ]
        return torch.cat(pieces, dim=2), None


def split(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """``x.split(widths, dim=2)`` of x, (T, batch, channels); gradients side by side are not copied together."""
    if not (torch.is_grad_enabled() and x.requires_grad) or not plain(x):
        return x.split(list(widths), dim=2)
    return _Split.apply(x, list(widths))


def _dense_strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
