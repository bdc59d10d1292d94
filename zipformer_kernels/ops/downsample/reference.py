"""Downsampling in plain PyTorch: what every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def downsample(src: Tensor, bias: Tensor, mask: Tensor | None, channels: int) -> Tensor:
    """Weighted means of every len(bias) frames, by the formula in the package's docstring."""
    y = (_groups(src, len(bias)) * bias.softmax(dim=0).reshape(-1, 1, 1)).sum(dim=1)
    y = torch.nn.functional.pad(y, (0, channels - src.shape[2]))
    return y if mask is None else y * mask.to(y.dtype)


def backward(
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[()],
    src: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    channels: int,
) -> tuple[Tensor | None, ...]:
    """The gradients, by the formulas in the package's docstring."""
    dy = grads[0] if mask is None else grads[0] * mask.to(grads[0].dtype)
    dy, weights = dy[..., : src.shape[2]].unsqueeze(1), bias.softmax(dim=0)
    dsrc = dbias = None
    if needs[0]:
        frames = (dy * weights.reshape(-1, 1, 1)).flatten(0, 1)
        dsrc = frames[: len(src)].clone()
        dsrc[-1:] += frames[len(src) :].sum(dim=0)
        dsrc = dsrc.to(src.dtype)
    if needs[1]:
        dweights = (_groups(src, len(bias)) * dy).sum(dim=(0, 2, 3))
        dbias = (weights * (dweights - (weights * dweights).sum())).to(bias.dtype)
    return dsrc, dbias, None


def empty_results(src: Tensor, bias: Tensor, mask: Tensor | None, channels: int) -> tuple[Tensor]:
    """An uninitialised tensor shaped as what `downsample` returns."""
    length = (src.shape[0] + bias.shape[0] - 1) // bias.shape[0]
    dtype = torch.promote_types(src.dtype, bias.dtype)
    return (src.new_empty((length, src.shape[1], channels), dtype=dtype),)


def _groups(src: Tensor, factor: int) -> Tensor:
    """The frames in groups, the last frame repeated: (length, factor, B, C)."""
    missing = -len(src) % factor
    if missing:
        src = torch.cat([src, src[-1:].expand(missing, -1, -1)])
    return src.unflatten(0, (len(src) // factor, factor))
