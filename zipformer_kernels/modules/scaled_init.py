"""Linear and Conv2d layers that start smaller than torch's, for the last layer of a residual branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def ScaledLinear(*args: Any, initial_scale: float = 1.0, **kwargs: Any) -> nn.Linear:
    """A torch.nn.Linear with its weight times `initial_scale` and its bias uniform in +-0.1 `initial_scale`.

    Args:
        *args, **kwargs: those of torch.nn.Linear.
        initial_scale: the factor on the initial values.
    """
    return _scaled(nn.Linear(*args, **kwargs), initial_scale)


def ScaledConv2d(*args: Any, initial_scale: float = 1.0, **kwargs: Any) -> nn.Conv2d:
    """A torch.nn.Conv2d with its weight times `initial_scale` and its bias uniform in +-0.1 `initial_scale`.

    Args:
        *args, **kwargs: those of torch.nn.Conv2d.
        initial_scale: the factor on the initial values.
    """
    return _scaled(nn.Conv2d(*args, **kwargs), initial_scale)


def _scaled(layer: Any, initial_scale: float) -> Any:
    with torch.no_grad():
        layer.weight *= initial_scale
        if layer.bias is not None:
            layer.bias.uniform_(-0.1 * initial_scale, 0.1 * initial_scale)
    return layer
