"""A projection in the dtype of products, as one node of the graph, with the gradient of its other uses added inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.branch.products import Products
from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.autograd import reference_gradients, store, stored_tensors
from zipformer_kernels.core.call import plain, without_autocast
from zipformer_kernels.core.private import apply_of


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        low: torch.dtype,
        given: Sequence[Tensor | None],
        src: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.products, ctx.low, ctx.request = products, low, backends.requested()
        ctx.src = None if src is None else src.dtype
        store(ctx, given[0], x, weight, bias)
        ctx.set_materialize_grads(False)
        return without_autocast(F.linear, x, *given), None if src is None else torch.ops.aten.alias(src)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        given, *inputs = saved = stored_tensors(ctx)
        if grad is None:
            return None, None, None, passed, None, None, None
        needs = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled() or not plain(grad, passed, *saved):
            project = lambda x, *linear: F.linear(x, *(None if p is None else p.to(ctx.low) for p in linear))  # noqa: E731
            return None, None, None, passed, *reference_gradients(project, inputs, needs, grad)
        with backends.as_in(ctx.request):
            return None, None, None, *without_autocast(_gradients, ctx, grad.contiguous(), passed, given, *inputs)


def _gradients(
    ctx: Any, grad: Tensor, passed: Tensor | None, given: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor | None]:
    products, wants_src, (wants_x, wants_weight, wants_bias) = (
        ctx.products,
        *ctx.needs_input_grad[3:4],
        ctx.needs_input_grad[4:],
    )
    dsrc, dx = passed, None
    if passed is not None and wants_src:
        dsrc = products.added_gradient(passed.contiguous(), grad, given, ctx.low)[0]
    elif wants_src:
        dsrc = (grad @ given).to(ctx.src)
    elif wants_x:
        dx = grad @ given
    dweight = products.weight_gradient(grad, x, weight.dtype) if wants_weight else None
    dbias = products.totals(products.lowered(grad, None, ctx.low)[1])[0].to(bias.dtype) if wants_bias else None
    return [dsrc, dx, dweight, dbias]


_apply = apply_of(_Project)  # it is settled that nobody looks on


def project(
    products: Products,
    low: torch.dtype,
    given: Sequence[Tensor | None],
    src: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """x W^T + b in `low`; and src once more, whose gradient is added to that of x inside of a product.

    Args:
        products: who multiplies.
        low: the dtype of products.
        given: weight and bias in `low`.
        src: what x is in `low`; None if nothing else uses it.
        x: (..., channels), contiguous.
        weight, bias: as the module has them.
    """
    if not torch.is_grad_enabled():
        return without_autocast(F.linear, x, *given), src
    return _apply(products, low, given, src, x, weight, bias)
