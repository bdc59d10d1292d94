"""The reference of bypass and of its variants as a backend, which serves every call."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import backward_of
from zipformer_kernels.core.launch import like
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bypass.reference import backward, bypass, limit_backward, limited_gradient, random_scale


def _forward(src_orig: Tensor, src: Tensor, scale: Tensor) -> tuple[Tensor]:
    """With the strides that `torch.empty_like` gives to src_orig."""
    return (like(bypass(src_orig, src, scale), torch.empty_like(src_orig)),)


def _limit(grad: Tensor, x: Tensor, least: float, most: float) -> tuple[Tensor]:
    return (like(limited_gradient(grad, x, least, most), torch.empty_like(grad)),)


def _scale_gradient(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], scale: Tensor, *drawn: Tensor | float | None
) -> tuple[Tensor | None, None, None]:
    """Of the scale alone: what is drawn has none."""
    (dscale,) = backward_of(random_scale)(needs[:1], grads, saved, scale, *drawn)
    return dscale, None, None


launchers = Launchers(
    lambda *_: None,
    _forward,
    backward,
    variants={
        "scale": Launchers(lambda *_: None, lambda *args: (random_scale(*args),), _scale_gradient),
        "limit": Launchers(lambda *_: None, _limit, limit_backward),
    },
)
