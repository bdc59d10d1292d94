"""Dropout with a scheduled rate: of elements (Dropout2), or of whole lines along a dimension (Dropout3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.core.module import Module
from zipformer_kernels.training.randomness import number
from zipformer_kernels.training.schedule import FloatLike


class Dropout2(Module):
    """Ordinary dropout whose rate `p` may follow a schedule."""

    def __init__(self, p: FloatLike) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, p=number(self.p), training=self.training)


class Dropout3(Module):
    """Dropout that drops whole lines of x along `shared_dim` (say, a channel for a whole utterance).

    Upstream lets no gradient through where its output happens to be exactly zero; here the mask alone
    decides.

    Args:
        p: the rate, or its schedule.
        shared_dim: the dimension over which the mask is shared.
    """

    def __init__(self, p: FloatLike, shared_dim: int) -> None:
        super().__init__()
        self.p = p
        self.shared_dim = shared_dim

    def forward(self, x: Tensor) -> Tensor:
        p = number(self.p)
        if not self.training or p == 0:
            return x
        shape = list(x.shape)
        shape[self.shared_dim] = 1
        chosen = torch.rand(shape, device=x.device) > p
        return x * chosen * (1.0 / (1.0 - p))
