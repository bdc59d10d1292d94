"""The bypass in plain PyTorch: what every backend is tested against, and what exporters trace."""

from __future__ import annotations

import torch
from torch import Tensor


def bypass(src_orig: Tensor, src: Tensor, scale: Tensor) -> Tensor:
    """src_orig + (src - src_orig) scale; scale (C,) or (B, C) is shared over what comes before."""
    return src_orig + (src - src_orig) * scale


def backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], src_orig: Tensor, src: Tensor, scale: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients, by the formulas in the package's docstring."""
    (dy,) = grads
    dsrc = dy * scale if needs[0] or needs[1] else None
    return (
        (dy - dsrc).to(src_orig.dtype) if needs[0] else None,
        dsrc.to(src.dtype) if needs[1] else None,
        (dy * (src - src_orig)).sum_to_size(scale.shape).to(scale.dtype) if needs[2] else None,
    )


def random_scale(
    scale: Tensor, skips: Tensor | None, straight: Tensor | None, skip_rate: float, straight_rate: float, batch: int
) -> Tensor:
    """The scale of each sequence, (batch, C): 0 where it skips, 1 or more where it goes straight through."""
    if skips is not None:
        scale = scale * (skips > skip_rate)
    if straight is not None:
        scale = torch.maximum(scale, (straight < straight_rate).to(scale.dtype))
    return scale.expand(batch, -1).contiguous()


def limited_gradient(grad: Tensor, x: Tensor, least: float, most: float) -> Tensor:
    """grad, turned where it would push x, by descent, further out of [least, most]."""
    outwards = ((grad > 0) & (x < least)) | ((grad < 0) & (x > most))
    return torch.where(outwards, -grad, grad)


def limit_backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], grad: Tensor, x: Tensor, least: float, most: float
) -> tuple[Tensor | None, ...]:
    """Gradients of `limited_gradient`: the same elements are turned; x decides only which."""
    (dy,) = grads
    outwards = ((grad > 0) & (x < least)) | ((grad < 0) & (x > most))
    return torch.where(outwards, -dy, dy) if needs[0] else None, torch.zeros_like(x) if needs[1] else None


def empty_results(src_orig: Tensor, src: Tensor, scale: Tensor) -> tuple[Tensor]:
    """An uninitialised tensor shaped as what `bypass` returns."""
    dtype = torch.promote_types(torch.promote_types(src_orig.dtype, src.dtype), scale.dtype)
    return (torch.empty_like(src_orig, dtype=dtype),)
