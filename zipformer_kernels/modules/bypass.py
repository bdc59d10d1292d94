"""The learned bypass around a layer or a stack, which also skips layers at random in training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from zipformer_kernels.branch.plain import made_of
from zipformer_kernels.core.module import Module
from zipformer_kernels.modules.bias_norm import BiasNorm
from zipformer_kernels.ops.bias_norm import bias_norm, bias_norm_bypass, one_pass_backend
from zipformer_kernels.ops.bypass import bypass, random_scale
from zipformer_kernels.training import FloatLike, ScheduledFloat, limit_param_value
from zipformer_kernels.training.randomness import number

SCALE_MIN = ScheduledFloat((0.0, 0.9), (20000.0, 0.2), default=0)


@made_of(parameters=("bypass_scale",))
class BypassModule(Module):
    """src_orig + (src - src_orig) * c, with c learned for each channel.

    (Zipformer paper, arXiv:2310.11230, section 3.2.)

    Args:
        embed_dim: channels.
        skip_rate: the probability, in training, that a sequence gets c = 0.
        straight_through_rate: the probability, in training, that a sequence gets c >= 1.
        scale_min, scale_max: limits on c held in training by the gradient, see `limit_param_value`. The lower
            one starts near 1, so that at first every layer has to learn something.
    """

    def __init__(
        self,
        embed_dim: int,
        skip_rate: FloatLike = 0.0,
        straight_through_rate: FloatLike = 0.0,
        scale_min: FloatLike = SCALE_MIN,
        scale_max: FloatLike = 1.0,
    ) -> None:
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((embed_dim,), 0.5))
        self.skip_rate = copy.deepcopy(skip_rate)
        self.straight_through_rate = copy.deepcopy(straight_through_rate)
        self.scale_min = copy.deepcopy(scale_min)
        self.scale_max = copy.deepcopy(scale_max)

    def forward(self, src_orig: Tensor, src: Tensor) -> Tensor:
        """Both inputs and the result are (T, batch, embed_dim)."""
        return bypass(src_orig, src, self.drawn_scale(src.shape[1]))

    def drawn_scale(self, batch: int) -> Tensor:
        """c, as (channels,) or, with sequences skipped at random, as (batch, channels)."""
        if not self.training:
            return self.bypass_scale
        scale = limit_param_value(self.bypass_scale, number(self.scale_min), number(self.scale_max))
        device, skips, straight = scale.device, None, None
        skip_rate = number(self.skip_rate)
        if skip_rate != 0.0:
            skips = torch.rand((batch, 1), device=device)
        straight_through_rate = number(self.straight_through_rate)
        if straight_through_rate != 0.0:
            straight = torch.rand((batch, 1), device=device)
        if skips is None and straight is None:
            return scale
        return random_scale(scale, skips, straight, skip_rate, straight_through_rate, batch)


def norm_and_bypass(norm: BiasNorm, bypass_module: BypassModule, src_orig: Tensor, x: Tensor) -> Tensor:
    """``bypass_module(src_orig, norm(x))``, with the same draws in the same order, and on a GPU in one pass.

    Neither module is called: use it where their calls may be left out (`zipformer_kernels.branch.plain`).

    Args:
        norm: of the channels, which are the last dimension.
        bypass_module: of as many channels.
        src_orig, x: (T, batch, channels).
    Raises:
        ValueError: a shape does not fit.
    """
    log_scale = norm.drawn_log_scale(x)
    args = x, norm.bias, log_scale, src_orig, bypass_module.drawn_scale(x.shape[1])
    backend = one_pass_backend(*args)
    if backend is not None:
        return bias_norm_bypass(*args, backend=backend)
    return bypass(src_orig, bias_norm(x, norm.bias, log_scale), args[-1])
