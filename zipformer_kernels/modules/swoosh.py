"""SwooshL and SwooshR as modules, as in upstream's ``scaling.py``."""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.branch.plain import made_of
from zipformer_kernels.core.module import Module
from zipformer_kernels.ops.swoosh import swoosh_l, swoosh_r


@made_of()
class SwooshL(Module):
    """SwooshL(x) = log(1 + exp(x - 4)) - 0.08 x - 0.035; see `zipformer_kernels.ops.swoosh.swoosh_l`."""

    def forward(self, x: Tensor) -> Tensor:
        """Any floating-point tensor -> the same shape and dtype."""
        return swoosh_l(x)


@made_of()
class SwooshR(Module):
    """SwooshR(x) = log(1 + exp(x - 1)) - 0.08 x - 0.313261687; see `zipformer_kernels.ops.swoosh.swoosh_r`."""

    def forward(self, x: Tensor) -> Tensor:
        """Any floating-point tensor -> the same shape and dtype."""
        return swoosh_r(x)
