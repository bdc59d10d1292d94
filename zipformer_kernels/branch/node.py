"""A residual branch as one node of the graph, forward and backward written by hand.

With x = src in the dtype of products (`low`)::

    h = x W1^T + b1,   a = middle(h),   y = src + chosen * (a W2^T + b2)

    g' = chosen * g,   dW2 = g'^T a,   db2 = sum g',   da = g' W2,   dh = middle'(da)
    dW1 = dh^T x,      db1 = sum dh,   dsrc = g + dh W1

Under autocast src, y and their gradients are in float32, and what products take is in half precision. Whoever writes y
or dsrc writes it in `low` too, in the same pass, for the branch that comes next (`Handed`). Parameters' gradients come
in the dtype of the parameters. What stands between the products is a `Middle`, one for each kind of branch
(`zipformer_kernels.branch.middles`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.branch.products import Products
from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.autograd import gradient_hook, reference_gradients, store, stored_tensors
from zipformer_kernels.core.call import plain, without_autocast
from zipformer_kernels.core.private import apply_of

Change = Callable[[Tensor, Tensor], Tensor]
"""``(gradient, x)`` -> the gradient of x as a Balancer or a Whiten that acts has it."""

Tensors = Sequence[Tensor | None]
PARAMETERS = 4
"""Weight and bias of both products."""


class Weights(NamedTuple):
    """Weight and bias of both products."""

    first: Tensor
    first_bias: Tensor | None
    last: Tensor
    last_bias: Tensor | None


class Middle(Protocol):
    """What a branch computes between its products, both included, and its gradient. It holds no tensors.

    `context` are the tensors that it takes beside x and the products' parameters.
    """

    def forward(
        self, products: Products, x: Tensor, weights: Weights, context: Tensors, stores: bool
    ) -> tuple[Tensor, Tensors]:
        """What the last product takes, a; and what backward reads, if it `stores`."""

    def backward(
        self, products: Products, grad: Tensor, weights: Weights, context: Tensors, stored: Tensors, asked: Asked
    ) -> Back:
        """The gradients, from that of the last product's result."""

    def reference(self, x: Tensor, weights: Weights, context: Tensors) -> Tensor:
        """a, in differentiable operations of torch; changes of gradients included."""


class Asked(NamedTuple):
    """What backward of a middle is asked for.

    Attributes:
        hidden: whether for the gradient of the first product's result.
        parameters: which gradients of the products' parameters.
        context: which gradients of the context.
        nodes: the nodes of the graph that made the context; None for a tensor without gradient.
    """

    hidden: bool
    parameters: Sequence[bool]
    context: Sequence[bool]
    nodes: Sequence[Any]


class Back(NamedTuple):
    """What backward of a middle gives.

    Attributes:
        dhidden: the gradient of the first product's result; None if it was not asked for.
        sums: of dhidden over rows, as `Products` has them; None if they are still to be taken.
        a: what the last product took.
        context: the gradients of the context, None for those that have none; empty if none has.
    """

    dhidden: Tensor | None
    sums: Tensor | None
    a: Tensor
    context: Sequence[Tensor | None] = ()


class Plan(NamedTuple):
    """How a module is run as one node in a call: all that is drawn at random was drawn.

    Attributes:
        middle: what stands between the products.
        context: what it takes.
        changes: what acts on the gradient of the module's result, in the order of the modules.
    """

    middle: Middle
    context: Tensors = ()
    changes: Sequence[Change] = ()


class Site(NamedTuple):
    """Where a branch runs, for its plan.

    Attributes:
        shape: of src, (T, batch, channels).
        low: the dtype of products.
        device: of src.
        hidden: whether the first product's result has a gradient.
        result: whether the module's result has one.
    """

    shape: tuple[int, int, int]
    low: torch.dtype
    device: torch.device
    hidden: bool
    result: bool


class Handed:
    """The gradient that one node of a layer hands to the node before it, also in `low`, and its sums."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, int, Tensor, Tensor] | None = None

    def give(self, grad: Tensor, low: Tensor, sums: Tensor) -> None:
        self._given = grad, grad._version, low, sums

    def take(self, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """`grad` in `low`, and its sums, if it is what was given last: nobody has added to it."""
        given, self._given = self._given, None
        if given is None or given[0] is not grad or given[1] != grad._version:
            return None
        return given[2:]


@dataclass
class Call:
    """A branch in one call of its layer.

    Attributes:
        plan: how it runs.
        products: who multiplies.
        low: the dtype of products.
        handed: what nodes of the layer hand to each other.
        hands: whether src comes from another node of the layer, which takes its gradient in `low` too.
        given: the products' parameters in `low`, and `chosen`; taken by forward.
    """

    plan: Plan
    products: Products
    low: torch.dtype
    handed: Handed
    hands: bool
    given: tuple[Weights, Tensor | None] | None

    def add(self, src: Tensor, x: Tensor, context: Tensors, stores: bool) -> tuple[Tensor, Tensor, Tensors]:
        """y, y in `low`, and what backward reads."""
        (weights, chosen), self.given = self.given, None
        a, stored = self.plan.middle.forward(self.products, x, weights, context, stores)
        if not (stores and self.plan.changes):
            y, low = self.products.added(src, a, weights.last, weights.last_bias, chosen, self.low)
            return y, low, (chosen, None, *weights, *stored)
        result = F.linear(a, weights.last, weights.last_bias)
        y = src + result if chosen is None else torch.addcmul(src, result, chosen.to(src.dtype))
        return y, y.to(self.low), (chosen, result, *weights, *stored)

    def gradients(
        self, grad: Tensor, x: Tensor, context: Tensors, stored: Tensors, asked: Asked, dtypes: Sequence[torch.dtype]
    ) -> tuple[Tensor | None, Weights, Sequence[Tensor | None]]:
        """dsrc, the gradients of the products' parameters in their dtypes, and those of the context."""
        products, grad = self.products, grad.contiguous()
        chosen, result, *rest = stored
        weights, stored = Weights(*rest[:PARAMETERS]), rest[PARAMETERS:]
        low, sums = self._lowered(grad, chosen, result)
        back = self.plan.middle.backward(products, low, weights, context, stored, asked)
        weight = self._of_weight(low, back.a, asked.parameters[2], dtypes[1])
        if back.dhidden is None:
            return grad, Weights(None, None, weight, self._of_biases(dtypes[1:], sums)[0]), back.context
        own = products.lowered(back.dhidden, None, self.low)[1] if back.sums is None else back.sums
        bias, other = self._of_biases(dtypes, own, sums)
        gradients = Weights(self._of_weight(back.dhidden, x, asked.parameters[0], dtypes[0]), bias, weight, other)
        dsrc, *handed = products.added_gradient(grad, back.dhidden, weights.first, self.low)
        if self.hands:
            self.handed.give(dsrc, *handed)
        return dsrc, gradients, back.context

    def _of_weight(self, grad: Tensor, x: Tensor, need: bool, dtype: torch.dtype) -> Tensor | None:
        """The gradient of a product's weight, if it is wanted."""
        return self.products.weight_gradient(grad, x, dtype) if need else None

    def _of_biases(self, dtypes: Sequence[torch.dtype], *sums: Tensor) -> list[Tensor | None]:
        """The gradients of biases from their sums, in one launch."""
        totals = self.products.totals(*sums)
        return [None if x is None else x.to(dtype) for x, dtype in zip(totals, dtypes, strict=False)]

    def _lowered(self, grad: Tensor, chosen: Tensor | None, result: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradient of the module's result in `low`, and its sums."""
        handed = self.handed.take(grad)
        low, sums = handed if handed and chosen is None else self.products.lowered(grad, chosen, self.low)
        for change in reversed(self.plan.changes):
            low, sums = change(low, result), None
        return self.products.lowered(low, None, self.low) if sums is None else (low, sums)

    def reference(self, chosen: Tensor | None, src: Tensor, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """y in differentiable operations of torch, of all rows at once: for gradients of gradients."""
        weights = Weights(*(None if w is None else w.to(self.low) for w in tensors[:PARAMETERS]))
        a = self.plan.middle.reference(x, weights, tensors[PARAMETERS:])
        result = F.linear(a, weights.last, weights.last_bias)
        for change in self.plan.changes:
            result = gradient_hook(result, change, result)
        return src + (result if chosen is None else result * chosen)


class AddBranch(torch.autograd.Function):
    """y = src + branch(src), and y in `low`, or None if that is y itself.

    Nothing but further derivatives asks for a gradient of the second.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, src: Tensor, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y, low, stored = without_autocast(call.add, src, x, tensors[PARAMETERS:], True)
        ctx.call, ctx.count, ctx.request = call, len(tensors), backends.requested()
        store(ctx, x, *tensors, *stored)
        ctx.src = src.dtype
        ctx.set_materialize_grads(False)
        return y, None if low is y else low

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, low: Tensor | None) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, stored_tensors(ctx)
        x, tensors, stored = saved[0], saved[1 : 1 + ctx.count], saved[1 + ctx.count :]
        given = grad if low is None else low.to(ctx.src) if grad is None else grad + low.to(ctx.src)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or not plain(given, *saved):
            reference = partial(call.reference, stored[0])
            src = torch.zeros((), dtype=ctx.src, device=x.device)  # its gradient is the one that is given
            needs = False, *ctx.needs_input_grad[2:]
            gradients = reference_gradients(reference, (src, x, *tensors), needs, given)
            return None, given, *gradients[1:]
        with backends.as_in(ctx.request):
            gradients = without_autocast(AddBranch._gradients, ctx, given, x, tensors, stored)
        return None, gradients[0], None, *gradients[1:]

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor, x: Tensor, tensors: Tensors, stored: Tensors) -> list[Tensor | None]:
        needs, context = ctx.needs_input_grad[3:], tensors[PARAMETERS:]
        first = 2 + sum(p is not None for p in tensors[:PARAMETERS])
        functions = iter([node for node, _ in ctx.next_functions[first:]])
        nodes = [None if tensor is None else next(functions) for tensor in context]
        hidden = ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or any(needs[:2]) or any(needs[PARAMETERS:])
        asked = Asked(hidden or any(node is not None for node in nodes), needs[:PARAMETERS], needs[PARAMETERS:], nodes)
        dtypes = tensors[0].dtype, tensors[2].dtype
        dsrc, weights, others = ctx.call.gradients(grad, x, context, stored, asked, dtypes)
        others = others or [None] * len(context)
        return [dsrc, *(g if need else None for g, need in zip((*weights, *others), needs, strict=True))]


_apply = apply_of(AddBranch)  # it is settled that nobody looks on


def acting(*changes: Change | None) -> tuple[Change, ...]:
    """Those of the changes of a gradient that act."""
    return tuple(change for change in changes if change is not None)


def add(call: Call, src: Tensor, x: Tensor, parameters: Weights) -> tuple[Tensor, Tensor]:
    """src plus a branch, and the same in `low`.

    Args:
        call: of the branch.
        src: (T, batch, channels), contiguous.
        x: src in `low`, or src itself.
        parameters: of the products, as the modules have them.
    """
    context, call.plan = call.plan.context, call.plan._replace(context=())  # autograd alone shall hold it
    if torch.is_grad_enabled():
        y, low = _apply(call, src, x, *parameters, *context)
        return y, y if low is None else low
    return without_autocast(call.add, src, x, context, False)[:2]
