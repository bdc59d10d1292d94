"""The one door between the ops and torch: torch.library operators and autograd.Function.

An op is a reference in plain PyTorch and, for each backend, a module of launchers. `Op` joins them:

- outside of tracing, one `torch.autograd.Function` calls the launchers directly (a few microseconds a call);
- under `torch.compile` and `torch.export` the same launchers stand behind the operators
  ``zipformer_kernels::<op>`` and ``zipformer_kernels::<op>_backward``, with fakes and a registered backward;
- the backend ``eager`` is, while tracing, the reference itself: the compiler sees plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class _GradientHook(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[..., Tensor], *saved: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*saved)
        ctx.unused = (None,) * len(saved)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.autocast(grad.device.type, enabled=False):
            return ctx.function(grad, *ctx.saved_tensors), None, *ctx.unused


def gradient_hook(x: Tensor, function: Callable[..., Tensor], *saved: Tensor) -> Tensor:
    """Returns x; in backward the gradient of x becomes ``function(grad, *saved)``.

    Every mechanism of Zipformer's training that is the identity forward (Balancer, Whiten, limits on parameters,
    penalties) is one such function.

    Args:
        x: any tensor.
        function: from the gradient of the result, and `saved`, to the gradient of x, of the same shape and dtype.
            It runs with autocast off and without grad mode.
        saved: tensors that `function` reads, kept as autograd keeps tensors (checked against in-place changes).
    """
    return _GradientHook.apply(x, function, *saved)
