"""The one rule by which a fused way may leave out the call of a module.

A fused way computes at once what several modules would compute one after the other, and calls none of them. That is
right only where each of them is exactly what the way was written for. So a call is left out only if

- the module's class is exactly the expected one: no subclass, wrapper, adapter, quantized or parametrized module;
- its ``forward``, in a stream its ``streaming_forward``, is the one its class was written with, replaced neither on the
  object nor on the class;
- nobody looks on: it has no hooks of its own, and there are no global ones (where there is no backward pass, only
  forward hooks count);
- its parameters are there, under their names, and are ordinary tensors, not of a subclass of `torch.Tensor`;
- the same holds of every part that its own ``forward`` would call.

Everything else is called, as upstream calls it. `made_of` tells what the parts of a class are, `matches` asks all of
the above, and `plain_parts` remembers what it said of a layer for as long as nothing has changed that it looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from itertools import chain, repeat
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.parameter import Parameter

from zipformer_kernels.branch.answer import Answer, reads
from zipformer_kernels.core.private import has_global_hooks
from zipformer_kernels.training import Balancer, ScaleGrad, Whiten

reads(Balancer, "channel_dim")


class When:
    """What a fused way is for, which decides what is asked of modules: numbers, by which torch.compile can index."""

    ANY = 0
    INFERENCE = 1  # nothing may be in training mode
    CHUNK = 2  # inference on a chunk of a stream, where `streaming_forward` calls fewer parts than ``forward``


Expected = type[nn.Module] | Callable[[nn.Module, int], bool]
"""What a module has to be: of a class, or what a function of the module, and of when, says."""

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
its parts for each `When`."""


_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = dict.fromkeys(
    (nn.Linear, nn.Conv1d, nn.Conv2d), ("weight", "bias")
)
"""The parameters that a fused way reads of a class."""


def made_of(
    not_in_chunks: dict[str, Expected] | None = None,
    calls_parts: bool = False,
    parameters: tuple[str, ...] = (),
    **parts: Expected,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Declares, as a decorator, what a module is made of: the expected module for each attribute.

    Args:
        not_in_chunks: the parts that ``forward`` calls but ``streaming_forward`` does not.
        calls_parts: whether who leaves out its call, with gradients, calls all of its parts himself.
        parameters: the names of its own parameters.
        **parts: all others.
    """
    every = {**parts, **(not_in_chunks or {})}

    def declare(kind: type[nn.Module]) -> type[nn.Module]:
        any_time = {} if calls_parts else every
        _PARAMETERS[kind] = parameters
        _KINDS[kind] = kind.forward, getattr(kind, "streaming_forward", None), (any_time, every, parts)
        return kind

    return declare


def plain_parts(module: nn.Module, when: int) -> Set[str]:
    """The names of all parts of a module whose calls may be left out.

    Args:
        module: of a class declared by `made_of`, or of a subclass.
        when: what the fused way is for.
    """
    if has_global_hooks():
        return NONE
    remembers = not is_dynamo_compiling()  # which cannot record weak references
    if remembers and (known := _known.setdefault(module, {}).get(when)) is not None and known.holds(module._modules):
        return known.names
    expected, children = _parts_of(module, when), module._modules
    names = frozenset([n for n in expected if n in children and matches(children[n], expected[n], when)])
    # Where a part is not plain, all are asked anew each time.
    if remembers and len(names) == len(expected.keys() & children.keys()):
        parts = {name: children[name] for name in names}
        looked_at = [inside for part in parts.values() for inside in _looked_at(part, when)]
        answer = _known[module][when] = Answer(parts, looked_at, backward=not when)
        return answer.names
    if remembers:
        _known[module].pop(when, None)
    return names


def parameters_of(module: nn.Module, names: Set[str]) -> Iterable[Tensor | None]:
    """The parameters of parts of a module, of which `plain_parts` has just said that their calls may be left out."""
    answer = next((answer for answer in list(_known[module].values()) if answer.names is names), None)
    if answer is not None:
        return answer.parameters()
    return chain.from_iterable(module._modules[name].parameters() for name in names)


def takes(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module, called or not, takes what only classes of ours do, as handles of weights and rules of masks.

    Classes and functions in the place of ours want tensors.
    """
    return type(module) in kinds and "forward" not in module.__dict__


def _parts_of(module: nn.Module, when: int) -> dict[str, Expected]:
    return next(_KINDS[kind][2][when] for kind in type(module).__mro__ if kind in _KINDS)


def matches(module: nn.Module, expected: Expected, when: int) -> bool:
    """Whether the call of a module, and those of its parts, may be left out, as far as they show.

    Args:
        module: whatever stands in the expected module's place.
        expected: what a fused way was written for.
        when: what that way is for.
    """
    kind = type(module)
    if kind is not expected:
        return not isinstance(expected, type) and expected(module, when)
    forward, streaming_forward, parts = _KINDS[kind]
    own = module.__dict__  # to get its items takes half of the time that attributes take
    if kind.forward is not forward or "forward" in own or (when and own["training"]):
        return False
    if (
        when == When.CHUNK
        and streaming_forward is not None
        and (kind.streaming_forward is not streaming_forward or "streaming_forward" in own)
    ):
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    if not when and (own["_backward_hooks"] or own["_backward_pre_hooks"]):  # an inference has no backward pass
        return False
    parameters = own["_parameters"]
    for name in _PARAMETERS.get(kind, ()):
        if name not in parameters or name in own:  # a buffer or an attribute, which nobody would look at
            return False
    for parameter in parameters.values():
        if type(parameter) is not Parameter and parameter is not None and type(parameter) is not Tensor:
            return False
    if parts := parts[when]:
        children = own["_modules"]
        for name, part in parts.items():
            child = children.get(name)
            if child is None or not matches(child, part, when):
                return False
    return True


def _looked_at(module: nn.Module, when: int) -> Iterable[nn.Module]:
    """The modules that `matches` looks at before it says yes."""
    yield module
    kind = type(module)
    for name in module._modules if kind is nn.Sequential else _KINDS[kind][2][when]:
        yield from _looked_at(module._modules[name], when)


_known: WeakKeyDictionary[nn.Module, dict[int, Answer]] = WeakKeyDictionary()


def sequential(*layers: Expected) -> Expected:
    """Expects an `nn.Sequential` of just these layers."""

    def expected(module: nn.Module, when: int) -> bool:
        if not matches(module, nn.Sequential, when) or len(module._modules) != len(layers):
            return False
        return all(map(matches, module._modules.values(), layers, repeat(when)))

    return expected


def convolution(kind: type[nn.Module], **settings: object) -> Expected:
    """Expects a convolution of a class with given attributes, such as its ``stride``, that pads with zeros."""
    wanted = {"padding_mode": "zeros", **settings}

    def expected(module: nn.Module, when: int) -> bool:
        return matches(module, kind, when) and all(getattr(module, name) == wanted[name] for name in wanted)

    return expected


def balancer(channel_dim: int) -> Expected:
    """Expects a Balancer of the channels along this dimension."""

    def expected(module: nn.Module, when: int) -> bool:
        return matches(module, Balancer, when) and module.channel_dim == channel_dim

    return expected


def depthwise(kind: type[nn.Module], padded: bool = True) -> Expected:
    """Expects a convolution of each channel by itself, without stride, with as many results as inputs or unpadded."""

    def expected(module: nn.Module, when: int) -> bool:
        if not matches(module, kind, when) or module.padding_mode != "zeros":
            return False
        ones = (1,) * len(module.kernel_size)
        padding = tuple(width // 2 if padded else 0 for width in module.kernel_size)
        geometry = module.stride == ones and module.dilation == ones and module.padding == padding
        return geometry and module.groups == module.in_channels == module.out_channels

    return expected
