"""Identities that change the gradient: limits on parameters, penalties on activations, scaling."""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.module import Module
from zipformer_kernels.ops.attention.dense import penalized
from zipformer_kernels.ops.bypass import limited_gradient
from zipformer_kernels.training.randomness import happens, logging_draw


def limit_param_value(x: Tensor, min: float, max: float, prob: float = 0.6, training: bool = True) -> Tensor:
    """Returns x; with probability `prob`, turns the gradients that would push x further out of [min, max].

    Where x < min every gradient becomes negative, and where x > max positive, so that descent leads back
    inside.

    Args:
        x: usually a parameter.
        min, max: the interval, in the units of x.
        prob: how often, in training, the limits are enforced; one draw of Python's ``random`` a call.
        training: False returns x without a draw.

    Raises:
        ValueError: min > max.
    """
    if not training or not happens(prob):
        return x
    if min > max:
        raise ValueError(f"min must not exceed max, got min={min} and max={max}")

    return gradient_hook(x, lambda grad, x: limited_gradient(grad, x.detach(), min, max), x)


def penalize_abs_values_gt(x: Tensor, limit: float, penalty: float, name: str | None = None) -> Tensor:
    """Returns x; its gradient gains that of the loss ``penalty * relu(abs(x) - limit).sum()``.

    A failsafe against implausible attention scores, not a regulariser: the loss it adds is not scaled by the
    loss scale of mixed precision.

    Args:
        x: any float tensor.
        limit: the absolute value from which elements are penalised.
        penalty: the weight of the loss.
        name: accepted for upstream's signature; upstream's random line of log about the loss is not written.
    """
    logging_draw(0.002)
    return penalized(x, penalty, limit)


def scale_grad(x: Tensor, alpha: float) -> Tensor:
    """Returns x; its gradient is multiplied by `alpha`."""
    return gradient_hook(x, lambda grad: grad * alpha)


class ScaleGrad(Module):
    """The identity; in training, gradients going back through it are multiplied by `alpha`.

    It keeps the gradients of the first convolution inside the range of float16.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return scale_grad(x, self.alpha) if self.training else x
