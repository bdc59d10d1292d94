"""What an answer about modules depended on, so that it need not be asked again while nothing has changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from itertools import chain, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any
from weakref import ref

from torch import Tensor, nn

_READ = "training", "_parameters", "_modules", "_forward_hooks", "_forward_pre_hooks"
_BACKWARD = "_backward_hooks", "_backward_pre_hooks"
_read, _read_backward = itemgetter(*_READ), itemgetter(*_READ, *_BACKWARD)
_own, _forward_of = attrgetter("__dict__"), attrgetter("forward")

_GEOMETRY = "kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels", "padding_mode"
_SETTINGS = {kind: itemgetter(*_GEOMETRY) for kind in (nn.Conv1d, nn.Conv2d)}
"""Of classes of which an expectation reads attributes: those attributes, of the module's ``__dict__``."""


def reads(kind: type[nn.Module], *attributes: str) -> None:
    """Declares which attributes of a class an expectation of it reads."""
    _SETTINGS[kind] = itemgetter(*attributes)


class Answer:
    """That the calls of some parts of a module may be left out, and everything that was looked at to say so.

    As long as all that is the same, the answer is. To compare costs a third of asking: it is done by loops in C. No
    module and no parameter is held: a part that is replaced is freed as ever.

    Attributes:
        names: of the parts.

    Args:
        parts: the parts, by name.
        modules: all modules that were looked at.
        backward: whether hooks of the backward pass count, and training mode does not.
    """

    def __init__(self, parts: dict[str, nn.Module], modules: Sequence[nn.Module], backward: bool) -> None:
        self.names: Set[str] = frozenset(parts)
        self._parts = list(parts), list(map(id, parts.values()))
        self._modules = list(map(ref, modules))
        self._kinds = list(map(type, modules))
        self._classes = list(dict.fromkeys(self._kinds))
        self._backward, self._read = backward, _read_backward if backward else _read
        self._settings = [(i, _SETTINGS[kind]) for i, kind in enumerate(self._kinds) if kind in _SETTINGS]
        self._seen = self._look(list(map(_own, modules)))

    def holds(self, children: dict[str, nn.Module]) -> bool:
        """Whether nothing has changed.

        Args:
            children: of the module whose parts they are.
        """
        names, parts = self._parts
        modules = [module() for module in self._modules]
        if list(map(id, map(children.get, names))) != parts or list(map(type, modules)) != self._kinds:
            return False
        return self._look(list(map(_own, modules))) == self._seen

    def parameters(self) -> Iterable[Tensor | None]:
        """The parameters of all modules that were looked at, as they are now."""
        return chain.from_iterable([module()._parameters.values() for module in self._modules])

    def _look(self, owns: list[dict[str, Any]]) -> tuple[Any, ...]:
        """All that an answer depends on, of the modules' attributes."""
        training, parameters, children, *hooks = zip(*map(self._read, owns), strict=True)
        return (
            not self._backward and any(training),
            any(map(any, hooks)),
            any(map(contains, owns, repeat("forward"))),
            any(map(contains, owns, repeat("streaming_forward"))),
            list(map(len, owns)),  # a parameter may be hidden by an attribute of its name
            list(chain.from_iterable(parameters)),
            list(map(type, chain.from_iterable(map(dict.values, parameters)))),
            list(chain.from_iterable(children)),
            list(map(id, chain.from_iterable(map(dict.values, children)))),
            [read(owns[i]) for i, read in self._settings],
            list(map(_forward_of, self._classes)),
            [getattr(kind, "streaming_forward", None) for kind in self._classes],
        )
