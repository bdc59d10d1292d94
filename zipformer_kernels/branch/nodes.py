"""What the branches of one call of a layer share where each runs as one node: products, casts, gradients handed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.branch.node import Call, Handed, Site, Weights, acting, add
from zipformer_kernels.branch.products import choose
from zipformer_kernels.branch.project import project
from zipformer_kernels.core.call import without_autocast
from zipformer_kernels.core.private import views_like

_ALIGNED = 8  # elements of half precision in 16 bytes


class Nodes:
    """The nodes of one call of a layer.

    Attributes:
        low: the dtype of products.

    Args:
        src: the layer's input.
        low: as above; that of src without autocast.
        linears: the modules of all products whose calls are left out.
    """

    def __init__(self, src: Tensor, low: torch.dtype, linears: Iterable[nn.Module]) -> None:
        self.low, self._products, self._handed = low, choose(src, low), Handed()
        self._source: tuple[Tensor | None, Tensor | None, bool] = (None, None, False)
        self._weights: dict[int, Tensor] | None = None
        if low != src.dtype:
            parameters = [p for linear in linears for p in _of(linear) if p is not None]
            self._weights = dict(zip(map(id, parameters), cast(parameters, low), strict=True))

    def add(
        self,
        branch: Branch,
        src: Tensor,
        state: Tensor | None,
        context: Sequence[Any],
        settings: dict[str, Any],
        balancer: nn.Module | None,
        chosen: Callable[[Tensor], Tensor | None],
    ) -> tuple[Tensor, Tensor | None] | None:
        """src plus a branch, and the next state; None where modules have to be called, before anything is drawn.

        Args:
            branch: the module.
            src: (T, batch, channels).
            state: left context in a stream, or None.
            context, settings: other arguments of its forward.
            balancer: of the branch's result, or None.
            chosen: draws which sequences of a tensor get the branch, (batch, 1), or None for all.
        """
        src, parameters = src.contiguous(), Weights(*_of(branch.in_proj), *_of(branch.out_proj))
        if parameters.last.shape[0] != src.shape[2]:  # the sum has other channels, or is an error
            return None
        site = self._site(src, parameters)
        plan = branch.plan(site, *context, **settings) if state is None else None
        if plan is None and (torch.is_grad_enabled() or branch.training):
            return None
        weights = self._low(parameters)
        if plan is None:
            return self._by_middle(branch, src, state, context, settings, weights)
        if balancer is not None:
            result = site.result or _any(plan.context)
            plan = plan._replace(changes=acting(*plan.changes, balancer.change(result, src.shape[-1])))
        x, made = self._lowered(src)
        call = Call(plan, self._products, self.low, self._handed, made, (weights, chosen(src)))
        y, low = add(call, src, x, parameters)
        self._source = y, low, True
        return y, None

    def project(self, linear: nn.Module, x: Tensor, passes: bool = True) -> tuple[Tensor, Tensor]:
        """``linear(x)``, and x for all that uses it further, so that gradients are added inside of a product.

        Args:
            linear: a plain `torch.nn.Linear`.
            x: (..., channels).
            passes: whether x is used further.
        """
        low, _ = self._lowered(x.contiguous()) if passes else (x.to(self.low), False)
        parameters = _of(linear)
        given = [self._weights.get(id(p)) if self._weights and p is not None else p for p in parameters]
        through = passes and x.requires_grad  # else the result of a node would have a gradient that x has not
        hidden, passed = project(self._products, self.low, given, x if through else None, low, *parameters)
        if not through:
            return hidden, x
        self._source = passed, low, False
        return hidden, passed

    def forget(self) -> None:
        """To be called where somebody may have changed the last result in place: what it is in `low` is cast anew."""
        self._source = None, None, False

    def _site(self, src: Tensor, parameters: Weights) -> Site:
        hidden = result = False
        if torch.is_grad_enabled():
            hidden = src.requires_grad or _any(parameters[:2])
            result = hidden or _any(parameters[2:])
        return Site(src.shape, self.low, src.device, hidden, result)

    def _by_middle(
        self,
        branch: Branch,
        src: Tensor,
        state: Tensor | None,
        context: Sequence[Any],
        settings: dict[str, Any],
        weights: Weights,
    ) -> tuple[Tensor, Tensor | None]:
        """Without gradients, by what the branch computes between its products."""
        hidden = F.linear(self._lowered(src)[0], weights.first, weights.first_bias)
        x, state = branch.middle(hidden, state, *context, **settings)
        x = branch.activated(x).to(self.low)
        y, low = without_autocast(self._products.added, src, x, weights.last, weights.last_bias, None, self.low)
        self._source = y, low, True
        return y, state

    def _lowered(self, src: Tensor) -> tuple[Tensor, bool]:
        """src in `low`, and whether a node has made it so."""
        if self._source[0] is not src:
            self._source = src, src if src.dtype == self.low else src.to(self.low), False
        return self._source[1:]

    def _low(self, parameters: Weights) -> Weights:
        if self._weights is None:
            return parameters
        return Weights(*(None if p is None else self._weights[id(p)] for p in parameters))


def cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The parameters in another dtype, side by side in one piece of memory: one launch.

    Those with whole groups of 16 bytes come first, so that each of them is aligned.
    """
    if not parameters:
        return []
    sizes = [p.numel() for p in parameters]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i] % _ALIGNED != 0)
    ordered = [parameters[i] for i in order]
    with torch.no_grad():
        memory = torch.empty(sum(sizes), dtype=dtype, device=parameters[0].device)
        views = views_like(memory, ordered)
        torch._foreach_copy_(views, ordered)
    casts: list[Tensor] = [memory] * len(sizes)
    for i, view in zip(order, views, strict=True):
        casts[i] = view if sizes[i] else view.view(parameters[i].shape)
    return casts


def _of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    parameters = linear._parameters  # by `nn.Module.__getattr__` each would take five times as long
    return parameters["weight"], parameters["bias"]


def _any(tensors: Iterable[Tensor | None]) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)
