"""One call of a layer: how its branches run, and what is carried from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.branch.nodes import Nodes
from zipformer_kernels.branch.plain import When, matches, takes
from zipformer_kernels.branch.ways import MODULES, WAYS, Added, Given, has_nodes, settle
from zipformer_kernels.core.call import PLAIN, unreadable
from zipformer_kernels.ops.attention import AttentionWeights
from zipformer_kernels.training import FloatLike
from zipformer_kernels.training.randomness import number


class State(NamedTuple):
    """Left context of a branch in a stream.

    Attributes:
        name: what the module's ``streaming_forward`` calls it.
        value: the tensor.
        settings: other arguments of that function which ``forward`` has not.
    """

    name: str
    value: Tensor
    settings: dict[str, Any]


class Run:
    """A call of a layer: offline, or on a chunk of a stream where there are states.

    Attributes:
        parts: the layer's modules, by name.
        settled: how branches run, see `zipformer_kernels.branch.ways`.
        states: of a stream, by the branch's name; None offline. Each branch puts its next one there.

    Args:
        layer: of a class declared by `zipformer_kernels.branch.plain.made_of`.
        src: its input.
        others: all other tensors of the call but masks.
        masks: the masks.
        states: as above.
    """

    def __init__(
        self,
        layer: nn.Module,
        src: Tensor,
        others: Sequence[Tensor | None],
        masks: Sequence[Tensor | None],
        states: dict[str, State] | None = None,
    ) -> None:
        if src.ndim != 3:
            raise ValueError(f"src: wanted (frames, batch, channels), got {tuple(src.shape)}")
        self.layer, self.parts, self.states = layer, layer._modules, states
        self.trains = states is None and layer.training
        if states is not None:
            others = *others, *(state.value for state in states.values())
        self.settled = MODULES
        when = When.INFERENCE if states is None else When.CHUNK
        self._differentiates = self.trains or torch.is_grad_enabled()
        if not self._differentiates:
            self.settled = settle(layer, src, others, when, masks)
        elif states is None and has_nodes(WAYS.get(src.device.type, ())):
            self.settled = settle(layer, src, others, When.ANY, masks)
        low = self.settled.low
        self.nodes = None if low is None else Nodes(src, low, self._linears())
        self._owns = False  # whether src may be overwritten: the layer's input may not, nor what others have seen
        self._dtype = src.dtype

    def rate(self, schedule: FloatLike) -> float:
        """How often a sequence skips something. Schedules are read in training only, for that may draw."""
        return number(schedule) if self.trains else 0.0

    def check(self, *tensors: Tensor) -> None:
        """Looks at tensors that come from a module which was called: if kernels cannot take them, modules must."""
        if self.settled is MODULES:
            return
        like = all(type(x) in PLAIN and x.dtype == self._dtype for x in tensors)
        if not like or unreadable(tensors) is not None:
            self.settled = MODULES

    def add(
        self,
        name: str,
        src: Tensor,
        *context: Any,
        skip: FloatLike = 0.0,
        mask: Tensor | None = None,
        balancer: str | None = None,
        **settings: Any,
    ) -> Tensor:
        """src plus a branch of it, in a new tensor or in the place of src.

        Args:
            name: the branch's.
            src: (T, batch, channels).
            *context: other arguments of its ``forward`` and ``streaming_forward``.
            skip: in training, how often a sequence goes without.
            mask: which sequences get the branch, (batch, 1), where that was drawn before.
            balancer: the name of the balancer of the branch's result; in a stream it is not called.
            **settings: other arguments, by name.
        """
        state = None if self.states is None else self.states.get(name)
        if self.states is not None:
            balancer = None
        if state is not None:
            settings |= state.settings
        rate = self.rate(skip)  # read before the module runs, so that numbers are drawn in upstream's order
        chosen = partial(self._chosen, rate, mask)
        added = None
        if name in self.settled.fused and (balancer is None or balancer in self.settled.fused):
            added = self._by_way(name, src, state, context, settings, balancer, chosen)
        if added is None:
            added = self._by_modules(name, src, state, context, settings, balancer, chosen)
        src, following = added
        if state is not None:
            self.states[name] = state._replace(value=following)
        self._owns = True
        return src

    def _by_way(
        self,
        name: str,
        src: Tensor,
        state: State | None,
        context: Sequence[Any],
        settings: dict[str, Any],
        balancer: str | None,
        chosen: Callable[[Tensor], Tensor | None],
    ) -> Added | None:
        """src plus a branch, and the next state, by the first way that serves; None if none does."""
        given = Given(self.settled.backend, src, state and state.value, context, settings, self._owns)
        if self.nodes is not None:
            shaping = None if balancer is None else self.parts[balancer]
            given = given._replace(nodes=self.nodes, balancer=shaping, chosen=chosen)
        ways = self.settled.ways
        return next(filter(None, (way.add(self.parts[name], given) for way in ways)), None)

    def _by_modules(
        self,
        name: str,
        src: Tensor,
        state: State | None,
        context: Sequence[Any],
        settings: dict[str, Any],
        balancer: str | None,
        chosen: Callable[[Tensor], Tensor | None],
    ) -> Added:
        """src plus a branch, and the next state, by calls of its modules."""
        module, following = self.parts[name], None
        context = _taken(module, context)
        if state is not None:
            result, following = module.streaming_forward(src, *context, **{state.name: state.value}, **settings)
        else:
            result = module(src, *context, **settings)
        if balancer is not None:
            result = self.parts[balancer](result)
        mask = None if state is not None else chosen(result)
        src = src + result if mask is None else torch.addcmul(src, result, mask)
        self.check(src)
        return src, following  # a new tensor, of which nodes know nothing

    def project(self, linear: nn.Module, x: Tensor, passes: bool = True) -> tuple[Tensor, Tensor]:
        """What a linear module makes of x, and x for its other uses; see `Nodes.project`."""
        if self.nodes is None or not matches(linear, nn.Linear, When.ANY):
            return linear(x), x
        return self.nodes.project(linear, x, passes)

    def _chosen(self, rate: float, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Which sequences get a branch: as drawn before, or at a rate; for a result like that tensor."""
        return mask if rate == 0.0 else self.layer.get_sequence_dropout_mask(like, rate)

    def _linears(self) -> Iterator[nn.Module]:
        """The modules of all products that nodes compute."""
        for name in self.settled.fused:
            part = self.parts[name]
            if isinstance(part, Branch):
                yield from (part.in_proj, part.out_proj)
            elif name == "self_attn_weights":
                yield from filter(lambda x: matches(x, nn.Linear, When.ANY), (part.in_proj, part.linear_pos))

    def watch(self, src: Tensor, *names: str) -> Tensor:
        """src behind modules that change nothing but gradients; in a stream there are none."""
        if self.states is not None:
            return src
        for name in names:
            if self._differentiates or name not in self.settled.fused:
                src = self._seen(name, self.parts[name](src))
                self._owns = False
        return src

    def mix(self, name: str, src_orig: Tensor, src: Tensor) -> Tensor:
        """The bypass of a name, from what came in to what has become of it."""
        bypass = self.parts[name]
        if name in self.settled.fused and not self._differentiates and bypass.bypass_scale.shape == src.shape[-1:]:
            return torch.lerp(src_orig, src, bypass.bypass_scale, out=src if self._owns else None)
        src = self._seen(name, bypass(src_orig, src))
        self.check(src)
        self._owns = False  # who has seen its result may hold it
        return src

    def _seen(self, name: str, result: Tensor) -> Tensor:
        """What a part made of src; unless it is plain it may have done so in place."""
        if self.nodes is not None and name not in self.settled.fused:
            self.nodes.forget()
        return result

    def joins(self, *names: str) -> bool:
        """Whether the calls of these modules may be left out for a function of all of them, also with gradients."""
        return self.nodes is not None and self.settled.fused.issuperset(names)

    def normalise(self, name: str, src: Tensor) -> Tensor:
        """The norm of a name."""
        norm = self.parts[name]
        if name in self.settled.fused and self.settled.backend is not None:
            src, self._owns = norm.settled(self.settled.backend, src), True
            return src
        src = self._seen(name, norm(src))
        self.check(src)
        self._owns = name in self.settled.fused
        return src


def _taken(module: nn.Module, context: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as a module takes them: other classes and functions in our place want tensors, not handles."""
    kind = type(module)
    if vars(kind).get("takes_handles") and takes(module, kind):  # a subclass of ours has not said so itself
        return context
    return tuple(x.materialize() if isinstance(x, AttentionWeights) else x for x in context)
