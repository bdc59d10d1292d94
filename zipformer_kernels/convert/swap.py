"""Gives a module another class in place, and remembers what it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zipformer_kernels.convert.rows import ROWS, Row
from zipformer_kernels.modules.encoder import Zipformer, join_interface

ORIGINAL = "_upstream_original"  # the attribute under which a swapped module has its `Original`
MISSING = object()


@dataclass(frozen=True, eq=False)
class Match:
    """What a module is.

    Attributes:
        name: of the row; the name of the class that it becomes.
        reason: why it is not swapped nevertheless, or None.
        settings: attributes that the version it has of this class needs.
    """

    name: str
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> Row:
        return ROWS[self.name]


@dataclass(frozen=True)
class Original:
    """What a swapped module was: its class, and the attributes that the swap changed."""

    cls: type[nn.Module]
    attributes: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        copied = {k: v if v is MISSING else copy.deepcopy(v, memo) for k, v in self.attributes.items()}
        return Original(self.cls, copied)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as None: a pickled model must load where upstream cannot be imported, and upstream's
        # compiled functions cannot be pickled at all.
        return type(None), ()


def changes(module: nn.Module, match: Match) -> dict[str, Any]:
    """The attributes that a swap changes, with their new values."""
    row = match.row
    values = {name: value(module) for name, value in row.adds.items() if not hasattr(module, name)}
    values |= {name: value(module) for name, value in row.replaces.items()}
    values |= match.settings | dict.fromkeys(row.drops, MISSING)
    values[ORIGINAL] = Original(type(module), {name: vars(module).get(name, MISSING) for name in values})
    return values


def swap(module: nn.Module, match: Match) -> None:
    """Makes a module what it was found to be."""
    change(module, type(match.row.example), changes(module, match))


def swap_back(module: nn.Module) -> None:
    """Undoes `swap`."""
    original: Original = vars(module)[ORIGINAL]
    change(module, original.cls, {**original.attributes, ORIGINAL: MISSING})


def change(module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Gives a module another class and other plain attributes; MISSING stands for none."""
    module.__class__ = cls
    if cls is Zipformer:
        join_interface(module)
    for name, value in attributes.items():
        if value is MISSING:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = value
