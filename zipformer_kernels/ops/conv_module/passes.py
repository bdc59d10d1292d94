"""The launchers of conv_module on a GPU, made of a backend's two launches: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core.joint import side_by_side
from zipformer_kernels.core.launch import GPU_DTYPES, like, unsupported_dtype
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.conv_module.arguments import Arguments
from zipformer_kernels.ops.conv_module.launchers import ConvLaunchers, Gradients
from zipformer_kernels.ops.conv_module.sums import Sums


@dataclass(frozen=True)
class Outputs:
    """What backward writes: da and ds, or neither; `step` is from row to row of them. SwooshR(y), or None."""

    da: Tensor | None
    ds: Tensor | None
    step: int
    activated: Tensor | None


@dataclass(frozen=True)
class Passes:
    """A backend's launches; neither is called where there are no elements.

    Attributes:
        forward: ``(arguments, y, activated, x_bias)``: fills y and SwooshR(y), of which one may be None; `x_bias`, of
            the projection and in the dtype of a, goes with y being None.
        backward: ``(arguments, dy, y, outputs, sums)`` -> the sums, flat. dy and y are dense and in `arguments.dtype`;
            with y, dy is the gradient of SwooshR(y).
        supports: as of `Launchers`.
    """

    forward: Callable[[Arguments, Tensor | None, Tensor | None, Tensor | None], None]
    backward: Callable[[Arguments, Tensor, Tensor | None, Outputs, Sums], Tensor]
    supports: Callable[..., str | None]

    def launchers(self) -> ConvLaunchers:
        """The launchers of the op, of its variant ``infer``, and its passes in a layer."""
        return ConvLaunchers(
            self.supports,
            self._op_forward,
            self._op_backward,
            variants={"infer": Launchers(self._unsupported_infer, self._infer, None)},
            activated=self._activated,
            activated_gradient=self._activated_gradient,
            gradient=self._gradient,
        )

    # ---- the op ----

    def _op_forward(self, *args: Any) -> tuple[Tensor]:
        arguments = Arguments(*args)
        y = arguments.result()
        if y.numel() > 0:
            self.forward(arguments, y, None, None)
        return (y,)

    def _op_backward(
        self, needs: Sequence[bool], grads: tuple[Tensor], saved: tuple[()], *args: Any
    ) -> tuple[Tensor | None, ...]:
        arguments = Arguments(*args)
        a, s = arguments.a, arguments.s
        outputs = Outputs(None, None, a.shape[2], None)
        joint = side_by_side(a, s) if needs[0] and needs[1] else None
        if joint is not None:
            outputs = Outputs(*torch.empty_like(joint).chunk(2, dim=2), joint.shape[2], None)
        elif needs[0] or needs[1]:
            outputs = Outputs(a.new_empty(a.shape), a.new_empty(a.shape), a.shape[2], None)
        found, sums = self._sums(arguments, grads[0], None, outputs, needs[2:7])
        inputs = [None, None]
        for i, gradient in enumerate((outputs.da, outputs.ds)):
            if needs[i]:
                given = arguments.given[i]
                inputs[i] = gradient if joint is not None else like(gradient, torch.empty_like(given))
        return (*inputs, *found.gradients(sums, needs[2:7]), None)

    # ---- in a layer ----

    def _activated(self, projected: Tensor, *rest: Any) -> tuple[Tensor | None, Tensor]:
        *rest, stores = rest
        arguments = Arguments(*projected.chunk(2, dim=2), *rest)
        y, activated = arguments.result() if stores else None, arguments.result()
        if activated.numel() > 0:
            self.forward(arguments, y, activated, None)
        return y, activated

    def _activated_gradient(
        self, needs: Sequence[bool], da: Tensor, y: Tensor, projected: Tensor, *conv: Any
    ) -> tuple[Tensor | None, list[Tensor | None], Tensor, Tensor | None]:
        activated = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        dprojected, gradients, sums = self._from(needs, da.to(y.dtype), y, activated, projected, *conv)
        return dprojected, gradients, activated, sums

    def _gradient(self, needs: Sequence[bool], dy: Tensor, projected: Tensor, *conv: Any) -> Gradients:
        return self._from(needs, dy, None, None, projected, *conv)

    def _from(
        self, needs: Sequence[bool], dy: Tensor, y: Tensor | None, activated: Tensor | None, *args: Any
    ) -> Gradients:
        projected, *conv = args
        arguments = Arguments(*projected.chunk(2, dim=2), *conv, dy.dtype)
        dprojected = projected.new_empty(projected.shape) if needs[0] else None
        da, ds = (None, None) if dprojected is None else dprojected.chunk(2, dim=2)
        outputs = Outputs(da, ds, projected.shape[2], activated)
        found, sums = self._sums(arguments, dy, y, outputs, needs[1:])
        return dprojected, found.gradients(sums, needs[1:]), found.of_inputs(sums)

    def _sums(
        self, arguments: Arguments, dy: Tensor, y: Tensor | None, outputs: Outputs, needs: Sequence[bool]
    ) -> tuple[Sums, Tensor]:
        found = Sums(arguments, outputs.da is not None, any(needs))
        if dy.numel() == 0:
            return found, found.empty()
        y = None if y is None else y.contiguous()
        return found, self.backward(arguments, dy.contiguous(), y, outputs, found)

    # ---- without gradients ----

    def _unsupported_infer(self, x: Tensor, x_bias: Tensor | None, left: Tensor | None, *rest: Any) -> str | None:
        if left is not None:
            return "it takes no left context of a stream"
        if x_bias is not None and x_bias.dtype != x.dtype:
            return f"it takes x_bias of the dtype of x, {x.dtype}, got {x_bias.dtype}"
        reason = unsupported_dtype(x, GPU_DTYPES)
        return reason or self.supports(*x.chunk(2, dim=2), *rest, x.dtype)

    def _infer(self, x: Tensor, x_bias: Tensor | None, left: None, *rest: Any) -> tuple[Tensor, Tensor]:
        arguments = Arguments(*x.chunk(2, dim=2), *rest, x.dtype)
        activated = arguments.result()
        if activated.numel() > 0:
            self.forward(arguments, None, activated, None if x_bias is None else x_bias.contiguous())
        return activated, x.new_empty(0)
