"""What a backend offers of conv_module beside the op: its passes in a layer, from one projection to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from zipformer_kernels.core.op import Launchers

Gradients = tuple[Tensor | None, list[Tensor | None], Tensor | None]
"""dprojected, the gradients of the convolution's parameters, partial sums."""


@dataclass(frozen=True, kw_only=True)
class ConvLaunchers(Launchers):
    """Launchers of the op ``conv_module``, and its passes in a layer. A backend without these has plain torch's.

    ``projected`` is (T, B, 2 C): a, then s. ``*conv`` stands for seven arguments of the op: weight, bias,
    causal_weight, causal_bias, edge_scale, padding, chunk_size; without chunks the third to the fifth are None. A call
    is served where `supports` has no reason against the op's call with both halves of ``projected``. Nothing is
    differentiable.

    Gradients: `needs` says which are wanted, of projected and of the five parameters in their order. dprojected is
    (T, B, 2 C) and dense, in the dtype of ``projected``; those of the parameters have their dtypes; what is not wanted
    is None. ``sums`` are partial sums of dprojected over rows, (parts, 2 C), in float32 or better, from which the bias
    of the projection has its gradient; None without dprojected.

    Attributes:
        activated: ``(projected, *conv, dtype, stores)`` -> y and SwooshR(y), both dense and in `dtype`: that of
            ``projected``, or float32. y is the op's result; None unless `stores`.
        activated_gradient: ``(needs, da, y, projected, *conv)`` -> dprojected, the list of the parameters' gradients,
            SwooshR(y) again, sums; from da, the gradient of SwooshR(y), and y as `activated` has returned it.
        gradient: ``(needs, dy, projected, *conv)`` -> dprojected, the list of the parameters' gradients, sums; from dy,
            the gradient of y, in a dtype that y can have.
    """

    activated: Callable[..., tuple[Tensor | None, Tensor]]
    activated_gradient: Callable[..., tuple[Tensor | None, list[Tensor | None], Tensor, Tensor | None]]
    gradient: Callable[..., Gradients]
