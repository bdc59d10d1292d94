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


def empty_results(src_orig: Tensor, src: Tensor, scale: Tensor) -> tuple[Tensor]:
    """An uninitialised tensor shaped as what `bypass` returns."""
    dtype = torch.promote_types(torch.promote_types(src_orig.dtype, src.dtype), scale.dtype)
    return (torch.empty_like(src_orig, dtype=dtype),)
