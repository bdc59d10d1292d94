"""BiasNorm: the normalisation Zipformer uses in place of LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zipformer_kernels.branch.plain import made_of
from zipformer_kernels.core.module import Module
from zipformer_kernels.core.op import SettledBackend
from zipformer_kernels.ops.bias_norm import bias_norm
from zipformer_kernels.training import FloatLike, limit_param_value
from zipformer_kernels.training.randomness import number


@made_of(parameters=("log_scale", "bias"))
class BiasNorm(Module):
    """y = x * exp(log_scale) / RMS(x - bias), the mean of the RMS over the channels, with no epsilon.

    The trainable bias lets a channel carry a large constant without shrinking the others, which is what
    networks with LayerNorm are seen to need. (Zipformer paper, arXiv:2310.11230, section 3.3.)

    Args:
        num_channels: the size of x along `channel_dim`.
        channel_dim: which dimension of x holds the channels; may be negative.
        log_scale: initial value of the scalar parameter.
        log_scale_min, log_scale_max: limits held in training by the gradient, see `limit_param_value`.
        store_output_for_backprop: accepted as upstream has it; it chose what upstream stored for backward.
    """

    def __init__(
        self,
        num_channels: int,
        channel_dim: int = -1,
        log_scale: float = 1.0,
        log_scale_min: FloatLike = -1.5,
        log_scale_max: FloatLike = 1.5,
        store_output_for_backprop: bool = False,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.log_scale = nn.Parameter(torch.full((), float(log_scale)))  # of torch.tensor no fake copy can be made
        self.bias = nn.Parameter(torch.empty(num_channels).normal_(mean=0, std=1e-4))
        self.log_scale_min = log_scale_min
        self.log_scale_max = log_scale_max
        self.store_output_for_backprop = store_output_for_backprop

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x, of any shape with `num_channels` along `channel_dim`."""
        return bias_norm(x, self.bias, self.drawn_log_scale(x), self.channel_dim)

    def drawn_log_scale(self, x: Tensor) -> Tensor:
        """`log_scale`, held in training within its limits; x as of `forward`, which must fit."""
        if x.shape[self.channel_dim] != self.num_channels:
            raise ValueError(
                f"x: wanted {self.num_channels} channels along dimension {self.channel_dim}, got {tuple(x.shape)}"
            )
        return limit_param_value(
            self.log_scale, number(self.log_scale_min), number(self.log_scale_max), training=self.training
        )

    def settled(self, backend: SettledBackend, x: Tensor) -> Tensor:
        """`forward` without gradients, on a backend that was settled; x as there."""
        return bias_norm(x, self.bias, self.log_scale, self.channel_dim, backend=backend)
