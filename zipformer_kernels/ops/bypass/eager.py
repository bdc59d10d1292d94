"""The reference of bypass as a backend, which serves every call."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.launch import like
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bypass.reference import backward, bypass


def _forward(src_orig: Tensor, src: Tensor, scale: Tensor) -> tuple[Tensor]:
    """With the strides that `torch.empty_like` gives to src_orig."""
    return (like(bypass(src_orig, src, scale), torch.empty_like(src_orig)),)


launchers = Launchers(lambda *_: None, _forward, backward)
