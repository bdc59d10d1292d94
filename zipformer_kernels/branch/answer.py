"""What an answer about modules depended on, so that it need not be asked again while nothing has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import Any

from torch import Tensor, nn

_READ = "training", "_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks"
_BACKWARD = "_backward_hooks", "_backward_pre_hooks"
_read, _read_backward = itemgetter(*_READ), itemgetter(*_READ, *_BACKWARD)
_own = attrgetter("__dict__")
_parameters_of, _children_of, _forward_of = itemgetter(1), itemgetter(2), attrgetter("forward")

_GEOMETRY = "kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels", "padding_mode"
_SETTINGS = {kind: itemgetter(*_GEOMETRY) for kind in (nn.Conv1d, nn.Conv2d)}
"""Of classes of which an expectation reads attributes: those attributes, of the module's ``__dict__``."""


def reads(kind: type[nn.Module], *attributes: str) -> None:
    """Declares which attributes of a class an expectation of it reads."""
    _SETTINGS[kind] = itemgetter(*attributes)


class Answer:
    """That the calls of some parts of a module may be left out, and everything that was looked at to say so.

    As long as all that is the same, the answer is. To compare costs a third of asking: it is done by loops in C.

    Attributes:
        names: of the parts.

    Args:
        parts: the parts, by name.
        modules: all modules that were looked at.
        backward: whether hooks of the backward pass count.
    """

    def __init__(self, parts: dict[str, nn.Module], modules: Sequence[nn.Module], backward: bool) -> None:
        self.names: Set[str] = frozenset(parts)
        self._parts, self._modules = parts, modules
        self._kinds = list(map(type, modules))
        self._classes = list(dict.fromkeys(self._kinds))
        self._forwards = self._read_forwards()
        self._read = _read_backward if backward else _read
        states = list(map(self._read, map(_own, modules)))
        self._state = list(chain.from_iterable(states))  # with the dictionaries themselves, not what they hold
        self._hooks = [hooks for state in states for hooks in state[3:]]
        self._parents = [children for children in map(_children_of, states) if children]
        self._children = self._read_children()
        self._holders = [parameters for parameters in map(_parameters_of, states) if parameters]
        self._parameter_kinds = list(map(type, self.parameters()))
        self._set = [(m, _SETTINGS[kind]) for m, kind in zip(modules, self._kinds, strict=True) if kind in _SETTINGS]
        self._settings = self._read_settings()

    def holds(self, children: dict[str, nn.Module]) -> bool:
        """Whether nothing has changed.

        Args:
            children: of the module whose parts they are.
        """
        owns = list(map(_own, self._modules))
        return (
            list(map(children.get, self._parts)) == list(self._parts.values())
            and list(map(type, self._modules)) == self._kinds
            and all(map(is_, chain.from_iterable(map(self._read, owns)), self._state))
            and not any(self._hooks)
            and not any(map(contains, owns, repeat("forward")))
            and not any(map(contains, owns, repeat("streaming_forward")))
            and self._read_children() == self._children
            and list(map(type, self.parameters())) == self._parameter_kinds
            and self._read_settings() == self._settings
            and self._read_forwards() == self._forwards
        )

    def parameters(self) -> Iterable[Tensor | None]:
        """The parameters of all modules that were looked at, as they are now."""
        return chain.from_iterable(map(dict.values, self._holders))

    def _read_children(self) -> list[tuple[tuple[str, nn.Module], ...]]:
        return list(map(tuple, map(dict.items, self._parents)))

    def _read_settings(self) -> list[Any]:
        return [read(module.__dict__) for module, read in self._set]

    def _read_forwards(self) -> list[Any]:
        kinds = self._classes
        return [*map(_forward_of, kinds), *(getattr(kind, "streaming_forward", None) for kind in kinds)]
