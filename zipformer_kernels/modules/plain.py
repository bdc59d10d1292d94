"""The one rule by which a fused way may leave out the call of a module.

A fused way computes at once what several modules would compute one after the other, and calls none of them. That is
right only where each of them is exactly what the way was written for. So a call is left out only if

- the module's class is exactly the expected one: no subclass, wrapper, adapter, quantized or parametrized module;
- its ``forward`` is the one its class was written with, replaced neither on the object nor on the class;
- nobody looks on: it has no hooks of its own, forward or backward, and there are no global ones;
- its parameters are ordinary tensors, not of a subclass of `torch.Tensor`;
- the same holds of every part that its own ``forward`` would call.

Everything else is called, as upstream calls it. `made_of` tells what the parts of a class are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import Parameter

from zipformer_kernels.training import Balancer, ScaleGrad, Whiten

Expected = type[nn.Module] | Callable[[nn.Module, bool], bool]
"""What a module has to be: of a class, or what a function of the module, and of `infers`, says."""

_KINDS: dict[type[nn.Module], tuple[Callable, dict[str, Expected]]] = {
    kind: (kind.forward, {})
    for kind in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Sequential),
        *(Balancer, ScaleGrad, Whiten),
    )
}
"""Of each class that a fused way can leave out: the forward it was written with, and its parts."""


def made_of(**parts: Expected) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Declares, as a decorator, what a module's ``forward`` is made of: the expected module for each attribute."""

    def declare(kind: type[nn.Module]) -> type[nn.Module]:
        _KINDS[kind] = kind.forward, parts
        return kind

    return declare


def plain_module(module: nn.Module, expected: Expected, infers: bool = False) -> bool:
    """Whether the call of a module, and those of its parts, may be left out.

    Args:
        module: whatever stands in the expected module's place.
        expected: what a fused way was written for.
        infers: whether that way is for inference only, so that nothing may be in training mode.
    """
    return not _has_global_hooks() and matches(module, expected, infers)


def plain_part(module: nn.Module, name: str, infers: bool = False) -> bool:
    """`plain_module` of the part that a module, of a class declared by `made_of` or of a subclass, has under a name."""
    if _has_global_hooks():
        return False
    part = module._modules.get(name)
    kind = next(kind for kind in type(module).__mro__ if kind in _KINDS)
    return part is not None and matches(part, _KINDS[kind][1][name], infers)


def _has_global_hooks() -> bool:
    """Whether anyone looks on at every module. Torch has such a function only since 2.8."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def matches(module: nn.Module, expected: Expected, infers: bool) -> bool:
    """`plain_module` but for global hooks, which are asked for once."""
    kind = type(module)
    if kind is not expected:
        return not isinstance(expected, type) and expected(module, infers)
    forward, parts = _KINDS[kind]
    if kind.forward is not forward or "forward" in module.__dict__ or (infers and module.training):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) is not Parameter and type(parameter) is not Tensor:
            return False
    children = module._modules
    for name, part in parts.items():
        child = children.get(name)
        if child is None or not matches(child, part, infers):
            return False
    return True


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether anyone wants to see the gradients of what a module returns, which then must be tensors."""
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def sequential(*layers: Expected) -> Expected:
    """Expects an `nn.Sequential` of just these layers."""

    def expected(module: nn.Module, infers: bool) -> bool:
        if not matches(module, nn.Sequential, infers) or len(module._modules) != len(layers):
            return False
        return all(map(matches, module._modules.values(), layers, repeat(infers)))

    return expected


def convolution(kind: type[nn.Module], **settings: object) -> Expected:
    """Expects a convolution of a class with given attributes, such as its ``stride``, that pads with zeros."""
    wanted = {"padding_mode": "zeros", **settings}

    def expected(module: nn.Module, infers: bool) -> bool:
        return matches(module, kind, infers) and all(getattr(module, name) == wanted[name] for name in wanted)

    return expected


def depthwise(kind: type[nn.Module], padded: bool = True) -> Expected:
    """Expects a convolution of each channel by itself, without stride, with as many results as inputs or unpadded."""

    def expected(module: nn.Module, infers: bool) -> bool:
        if not matches(module, kind, infers) or module.padding_mode != "zeros":
            return False
        ones = (1,) * len(module.kernel_size)
        padding = tuple(width // 2 if padded else 0 for width in module.kernel_size)
        geometry = module.stride == ones and module.dilation == ones and module.padding == padding
        return geometry and module.groups == module.in_channels == module.out_channels

    return expected
