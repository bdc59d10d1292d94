"""The one rule by which a fused way may leave out the call of a module.

A fused way computes at once what several modules would compute one after the other, and calls none of them. That is
right only where each of them is exactly what the way was written for. So a call is left out only if

- the module's class is exactly the expected one: no subclass, wrapper, adapter, quantized or parametrized module;
- its ``forward``, in a stream its ``streaming_forward``, is the one its class was written with, replaced neither on the
  object nor on the class;
- nobody looks on: it has no hooks of its own, and there are no global ones (where there is no backward pass, only
  forward hooks count);
- its parameters are ordinary tensors, not of a subclass of `torch.Tensor`;
- the same holds of every part that its own ``forward`` would call.

Everything else is called, as upstream calls it. `made_of` tells what the parts of a class are.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from itertools import repeat

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from zipformer_kernels.core.private import has_global_hooks
from zipformer_kernels.training import Balancer, ScaleGrad, Whiten


class Way:
    """What a fused way is for, which decides what is asked of modules: numbers, by which torch.compile can index."""

    ANY = 0
    INFERENCE = 1  # nothing may be in training mode
    CHUNK = 2  # inference on a chunk of a stream, where `streaming_forward` calls fewer parts than ``forward``


Expected = type[nn.Module] | Callable[[nn.Module, int], bool]
"""What a module has to be: of a class, or what a function of the module, and of the way, says."""

NONE: Set[str] = frozenset()
"""The names of no parts."""

_LEAVES = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Sequential),
    *(Balancer, ScaleGrad, Whiten),
)

_KINDS: dict[type[nn.Module], tuple[Callable, Callable | None, tuple[dict[str, Expected], ...]]] = {
    kind: (kind.forward, None, ({}, {}, {})) for kind in _LEAVES
}
"""Of each class that a fused way can leave out: the ``forward`` and ``streaming_forward`` that it was written with, and
its parts for each `Way`."""


def made_of(
    not_in_chunks: dict[str, Expected] | None = None, **parts: Expected
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Declares, as a decorator, what a module is made of: the expected module for each attribute.

    Args:
        not_in_chunks: the parts that ``forward`` calls but ``streaming_forward`` does not.
        **parts: all others.
    """
    every = {**parts, **(not_in_chunks or {})}

    def declare(kind: type[nn.Module]) -> type[nn.Module]:
        _KINDS[kind] = kind.forward, getattr(kind, "streaming_forward", None), (every, every, parts)
        return kind

    return declare


def plain_module(module: nn.Module, expected: Expected, way: int = Way.ANY) -> bool:
    """Whether the call of a module, and those of its parts, may be left out.

    Args:
        module: whatever stands in the expected module's place.
        expected: what a fused way was written for.
        way: what that way is for.
    """
    return not has_global_hooks() and matches(module, expected, way)


def plain_part(module: nn.Module, name: str, way: int = Way.ANY) -> bool:
    """`plain_module` of the part that a module, of a class declared by `made_of` or of a subclass, has under a name."""
    part = module._modules.get(name)
    return part is not None and plain_module(part, _parts_of(module, way)[name], way)


def plain_parts(module: nn.Module, way: int) -> Set[str]:
    """The names of all parts of a module, of such a class, whose calls may be left out."""
    if has_global_hooks():
        return NONE
    children = module._modules
    return {
        name
        for name, expected in _parts_of(module, way).items()
        if (part := children.get(name)) is not None and matches(part, expected, way)
    }


def _parts_of(module: nn.Module, way: int) -> dict[str, Expected]:
    return next(_KINDS[kind][2][way] for kind in type(module).__mro__ if kind in _KINDS)


def matches(module: nn.Module, expected: Expected, way: int) -> bool:
    """`plain_module` but for global hooks, which are asked for once."""
    kind = type(module)
    if kind is not expected:
        return not isinstance(expected, type) and expected(module, way)
    forward, streaming_forward, parts = _KINDS[kind]
    own = module.__dict__  # to get its items takes half of the time that attributes take
    if kind.forward is not forward or "forward" in own or (way and own["training"]):
        return False
    if (
        way == Way.CHUNK
        and streaming_forward is not None
        and (kind.streaming_forward is not streaming_forward or "streaming_forward" in own)
    ):
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    if not way and (own["_backward_hooks"] or own["_backward_pre_hooks"]):  # an inference has no backward pass
        return False
    for parameter in own["_parameters"].values():
        if type(parameter) is not Parameter and parameter is not None and type(parameter) is not Tensor:
            return False
    if parts := parts[way]:
        children = own["_modules"]
        for name, part in parts.items():
            child = children.get(name)
            if child is None or not matches(child, part, way):
                return False
    return True


def sequential(*layers: Expected) -> Expected:
    """Expects an `nn.Sequential` of just these layers."""

    def expected(module: nn.Module, way: int) -> bool:
        if not matches(module, nn.Sequential, way) or len(module._modules) != len(layers):
            return False
        return all(map(matches, module._modules.values(), layers, repeat(way)))

    return expected


def convolution(kind: type[nn.Module], **settings: object) -> Expected:
    """Expects a convolution of a class with given attributes, such as its ``stride``, that pads with zeros."""
    wanted = {"padding_mode": "zeros", **settings}

    def expected(module: nn.Module, way: int) -> bool:
        return matches(module, kind, way) and all(getattr(module, name) == wanted[name] for name in wanted)

    return expected


def depthwise(kind: type[nn.Module], padded: bool = True) -> Expected:
    """Expects a convolution of each channel by itself, without stride, with as many results as inputs or unpadded."""

    def expected(module: nn.Module, way: int) -> bool:
        if not matches(module, kind, way) or module.padding_mode != "zeros":
            return False
        ones = (1,) * len(module.kernel_size)
        padding = tuple(width // 2 if padded else 0 for width in module.kernel_size)
        geometry = module.stride == ones and module.dilation == ones and module.padding == padding
        return geometry and module.groups == module.in_channels == module.out_channels

    return expected
