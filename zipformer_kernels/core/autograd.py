"""What stands between kernels and autograd: an op's Function, tensors saved for it, and hooks on gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.call import plain, watcher, without_autocast
from zipformer_kernels.core.private import apply_of, saved_tensors_have_hooks


def store(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves tensors for the backward pass of a Function that hands them to kernels; `stored_tensors` returns them."""
    ctx.save_for_backward(*tensors)
    hooked = saved_tensors_have_hooks()
    ctx.forms = [None if x is None else (x.shape, x.device, x.dtype) for x in tensors] if hooked else None


def stored_tensors(ctx: Any) -> tuple[Tensor | None, ...]:
    """The tensors that `store` saved, on the device and in the dtype in which they were.

    Hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`) may put others in their place.

    Raises:
        ValueError: a hook returned another shape.
    """
    if ctx.forms is None:
        return ctx.saved_tensors
    tensors = []
    for x, form in zip(ctx.saved_tensors, ctx.forms, strict=True):
        if x is not None and x.shape != form[0]:
            raise ValueError(f"a hook on saved tensors must return shape {tuple(form[0])}, got {tuple(x.shape)}")
        tensors.append(x if x is None else x.to(*form[1:]))
    return tuple(tensors)


def aliases(inputs: Sequence[Any]) -> list[Any]:
    """Inputs of a function, with an alias in the place of each tensor that has a gradient.

    One input may have been computed from another. By the gradients of aliases each gets its own part alone.
    """
    return [torch.ops.aten.alias(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]


def reference_gradients(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of the inputs of a Function by autograd of a reference, themselves differentiable in grad mode.

    Args:
        reference: ``(*inputs)`` -> what the Function returned.
        inputs: as it saved them.
        needs: which gradients are wanted; None stands for the others, and for those of inputs that are not read.
        grad: of what it returned.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = aliases(inputs)
        out = reference(*inputs)
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


def backward_of(reference: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Launchers' backward by autograd of a reference, for an op of one output whose tensor arguments come first."""

    def backward(
        needs: Sequence[bool], grads: Sequence[Tensor], saved: Sequence[Tensor], *args: Any
    ) -> tuple[Tensor | None, ...]:
        tensors, values = args[: len(needs)], args[len(needs) :]
        leaves = [t.detach().requires_grad_() if need else t for t, need in zip(tensors, needs, strict=True)]
        with torch.enable_grad():
            y = reference(*leaves, *values)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grads, allow_unused=True, materialize_grads=True))
        return tuple(
            torch.empty_like(leaf).copy_(next(found)) if need else None
            for leaf, need in zip(leaves, needs, strict=True)
        )

    return backward


class OpFunction(torch.autograd.Function):
    """Forward and backward of one call of an `Op` on one backend, outside of tracing."""

    @staticmethod
    def forward(ctx: Any, op: Any, launchers: Any, *args: Any) -> Any:
        results = without_autocast(launchers.forward, *args)
        ctx.op, ctx.launchers, ctx.values = op, launchers, op._values(args)
        store(ctx, *op._to_store(args, results))
        return op._results(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        op, stored = ctx.op, stored_tensors(ctx)
        needs = tuple(ctx.needs_input_grad[2 + i] for i in op.tensors)
        saved, args = stored[len(op.saved) :], op._arguments(stored, ctx.values)
        # With create_graph=True gradients are differentiated in turn: the kernels' cannot be, the reference's can.
        if torch.is_grad_enabled():
            launch = op._reference_backward
        else:
            launch = (ctx.launchers if plain(*grads, *stored) else op.backends["eager"]).backward
        return None, None, *op._spread(without_autocast(launch, needs, grads, saved, *args))


apply_op = apply_of(OpFunction)
"""``OpFunction.apply`` of an op that has looked who watches it."""


class _GradientHook(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., Tensor], *saved: Tensor) -> Tensor:
        ctx.function, ctx.count = function, len(saved)
        ctx.save_for_backward(*saved)
        return torch.ops.aten.alias(x)  # unlike view_as, keeps the strides of dimensions of one element

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return without_autocast(ctx.function, grad, *ctx.saved_tensors), None, *(None,) * ctx.count


def _as_asked(request: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """The function's result with the choice of backends of its forward pass, whichever thread runs it."""
    with backends.as_in(request):
        return function(*args)


def gradient_hook(x: Tensor, function: Callable[..., Tensor], *saved: Tensor) -> Tensor:
    """Returns x; in backward the gradient of x becomes ``function(grad, *saved)``.

    Every mechanism of Zipformer's training that is the identity forward (Balancer, Whiten, limits on parameters,
    penalties) is one such function.

    Args:
        x: any tensor.
        function: from the gradient of the result, and `saved`, to the gradient of x, of the same shape and dtype.
            It runs with autocast off and without grad mode.
        saved: tensors that `function` reads, stored as autograd stores tensors (checked against in-place changes).
    Raises:
        NotImplementedError: a transform of torch.func is around the call.
    """
    if watcher() == "transform":
        raise NotImplementedError(
            "balancers, whitening and limits change the backward pass and cannot be transformed by torch.func "
            "(vmap, grad, jvp, ...): use zipformer_kernels.training.without_draws()"
        )
    if torch.compiler.is_compiling():  # the compiler takes no tensor twice
        saved = tuple(tensor.detach() for tensor in saved)
    else:
        function = partial(_as_asked, backends.requested(), function)
    return _GradientHook.apply(x, function, *saved)
