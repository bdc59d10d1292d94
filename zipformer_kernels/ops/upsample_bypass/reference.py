"""The bypass around a stack at a lower rate in plain PyTorch: what every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def upsample_bypass(src_orig: Tensor, src: Tensor, scale: Tensor, mask: Tensor | None, factor: int) -> Tensor:
    """src_orig + (each frame of src `factor` times - src_orig) scale."""
    src_orig = torch.nn.functional.pad(src_orig, (0, src.shape[2] - src_orig.shape[2]))
    return src_orig + (_repeated(src, mask, factor, len(src_orig)) - src_orig) * scale


def backward(
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[()],
    src_orig: Tensor,
    src: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    factor: int,
) -> tuple[Tensor | None, ...]:
    """The gradients, by the formulas in the package's docstring."""
    (dy,) = grads
    own, frames = src_orig.shape[2], len(src_orig)
    da = db = dc = None
    if needs[0]:
        da = (dy - dy * scale)[..., :own].to(src_orig.dtype)
    if needs[1]:
        whole = torch.nn.functional.pad(dy * scale, (0, 0, 0, 0, 0, len(src) * factor - frames))
        db = whole.unflatten(0, (len(src), factor)).sum(dim=1)
        db = (db if mask is None else db * mask.to(db.dtype)).to(src.dtype)
    if needs[2]:
        wide = torch.nn.functional.pad(src_orig, (0, src.shape[2] - own))
        dc = (dy * (_repeated(src, mask, factor, frames) - wide)).sum_to_size(scale.shape).to(scale.dtype)
    return da, db, dc, None


def empty_results(src_orig: Tensor, src: Tensor, scale: Tensor, mask: Tensor | None, factor: int) -> tuple[Tensor]:
    """An uninitialised tensor shaped as what `upsample_bypass` returns."""
    dtype = torch.promote_types(torch.promote_types(src_orig.dtype, src.dtype), scale.dtype)
    return (src.new_empty((*src_orig.shape[:2], src.shape[2]), dtype=dtype),)


def _repeated(src: Tensor, mask: Tensor | None, factor: int, frames: int) -> Tensor:
    """The masked frames of src, each `factor` times, the first `frames` of them."""
    src = src if mask is None else src * mask.to(src.dtype)
    return src.unsqueeze(1).expand(-1, factor, -1, -1).flatten(0, 1)[:frames]
