"""Swoosh, dropout and a linear layer in one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zipformer_kernels.branch.answer import reads
from zipformer_kernels.branch.plain import made_of
from zipformer_kernels.core.module import Module
from zipformer_kernels.modules.scaled_init import ScaledLinear
from zipformer_kernels.ops.swoosh import swoosh
from zipformer_kernels.ops.swoosh_linear import swoosh_linear
from zipformer_kernels.training import FloatLike
from zipformer_kernels.training.randomness import number

ACTIVATIONS = {"SwooshL": "l", "SwooshR": "r"}  # as swoosh_linear names them


@made_of(parameters=("weight", "bias"))
class ActivationDropoutAndLinear(Module):
    """y = W (mask * Swoosh(x)) + b, where the mask drops in training with a rate that may follow a schedule.

    Args:
        in_channels, out_channels: channels of x and y.
        bias: whether there is a b.
        activation: "SwooshL" or "SwooshR".
        dropout_p: the rate of the dropout, or its schedule.
        dropout_shared_dim: the dimension of x over which one mask is shared (0 for time); None for no
            sharing.
        initial_scale: see `ScaledLinear`.

    Raises:
        ValueError: `activation` is neither of the two.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        activation: str = "SwooshL",
        dropout_p: FloatLike = 0.0,
        dropout_shared_dim: int | None = -1,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: wanted one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        linear = ScaledLinear(in_channels, out_channels, bias=bias, initial_scale=initial_scale)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.activation = activation
        self.dropout_p = dropout_p
        self.dropout_shared_dim = dropout_shared_dim

    def forward(self, x: Tensor) -> Tensor:
        """Maps x, (..., in_channels), to (..., out_channels)."""
        shape = list(x.shape)
        if self.dropout_shared_dim is not None:
            shape[self.dropout_shared_dim] = 1
        draws, rate = self.draws(shape, x.dtype, x.device)
        mask = None if draws is None else (draws > rate) * (1.0 / (1.0 - rate))
        return swoosh_linear(x, self.weight, self.bias, mask, ACTIVATIONS[self.activation])

    def activated(self, x: Tensor) -> Tensor:
        """What the product takes in eval mode: Swoosh(x)."""
        return swoosh(x, ACTIVATIONS[self.activation])

    def draws(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, float]:
        """In training what is drawn for the dropout, uniform in [0, 1), and its rate; None where nothing is dropped.

        Args:
            shape: of x, but of size 1 along a shared dimension.
            dtype, device: of x.
        """
        rate = number(self.dropout_p) if self.training else 0.0
        return None if rate == 0.0 else torch.rand(shape, device=device, dtype=dtype), rate


reads(ActivationDropoutAndLinear, "activation")
