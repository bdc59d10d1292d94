"""Swaps the modules of a model built from upstream's classes for ours, in place, and back.

A swap keeps the module object and gives it our class: attributes, parameters, buffers, children, hooks and
the training flag are not copied but stay where they are. So everything that refers to them stays valid:
optimizers, ``state_dict`` keys, checkpoints, a DistributedDataParallel around the model, modules used in two
places, and the model itself where it is one of those swapped.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from zipformer_kernels.convert.digest import Digests
from zipformer_kernels.convert.recognise import ALIASES, Match, recognise
from zipformer_kernels.convert.report import Report
from zipformer_kernels.convert.rows import ROWS, listed
from zipformer_kernels.encoder import Zipformer, join_interface

__all__ = ["Report", "convert", "revert"]

LAYER = "ZipformerEncoderLayer"
ORIGINAL = "_upstream_original"  # the attribute under which a swapped module keeps its `_Original`
MISSING = object()


@dataclass(frozen=True)
class _Original:
    """What a swapped module was: its class, and the attributes that the swap changed."""

    cls: type[nn.Module]
    attributes: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Original:
        kept = {k: v if v is MISSING else copy.deepcopy(v, memo) for k, v in self.attributes.items()}
        return _Original(self.cls, kept)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as None: a pickled model must load where upstream cannot be imported, and upstream's
        # compiled functions cannot be pickled at all.
        return type(None), ()


def convert(
    model: nn.Module,
    ops: Iterable[str] | None = None,
    *,
    trust: Collection[str | type[nn.Module]] = (),
) -> Report:
    """Swaps, in place, every module of `model` that does what a class of ours does for ours.

    The model may hold modules of the package ``zipformer``, of an icefall recipe or of ZipVoice, or copies of them.
    They are recognised by what their methods do, whatever they are called: by a digest of the source of every method,
    with the helpers, constants and bases that it uses, and by attributes, children and shapes. Known versions that do
    something else than today's are swapped with the settings that make ours do the same. Whatever is unknown, such as a
    forward that someone has edited, is kept, called as before, and reported.

    Afterwards ``isinstance`` sees our classes. A pickled copy of the model needs this package and not
    upstream, and cannot be reverted; a deep copy can. Swapping twice does nothing more.

    Args:
        model: the model, or any part of one.
        ops: the ops to swap modules for: any of "swoosh", "bias_norm", "swoosh_linear", "attention",
            "nonlin_attention". By default all, and every module of upstream's besides.
        trust: classes, or names of classes, whose unknown methods are said to do what upstream's do.

    Returns:
        What was swapped, and what was kept and why.

    Raises:
        TypeError: `model` is not a module, or `ops` or `trust` a single string.
        ValueError: there is no such op.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    if isinstance(trust, str):
        raise TypeError(f"trust: wanted a collection of classes or names, got the string {trust!r}")
    rows = _selected(ops)
    report = Report()
    digests = Digests()
    matches = {module: (path, recognise(module, trust, digests)) for path, module in model.named_modules()}
    swaps: list[tuple[nn.Module, Match]] = []
    for module, (path, match) in matches.items():
        if match is None or match.name not in rows:
            continue
        name = type(module).__name__
        if match.reason is None:
            report.swapped.append((path, name))
            swaps.append((module, match))
        else:
            report.kept.append((path, name, match.reason))
    changes = [(module, type(match.row.example), _changes(module, match)) for module, match in swaps]
    for change in changes:  # only now, so that an error leaves the model whole
        _change(*change)
    return Report(report.swapped, report.kept, _layers(model))


def revert(model: nn.Module) -> Report:
    """Undoes `convert`: every module it swapped gets back its class and the attributes the swap had changed.

    What training has changed since (parameters, batch counts, the state of a Whiten) stays.

    Args:
        model: the model, or any part of one.

    Returns:
        What was swapped back, and what was kept: modules that were pickled, and so forgot what they were.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for path, module in model.named_modules():
        if ORIGINAL not in vars(module):
            continue
        name, original = type(module).__name__, getattr(module, ORIGINAL)
        if original is None:
            report.kept.append((path, name, "it was pickled since it was swapped"))
            continue
        _change(module, original.cls, {**original.attributes, ORIGINAL: MISSING})
        report.swapped.append((path, original.cls.__name__))
    return Report(report.swapped, report.kept, _layers(model))


def _layers(model: nn.Module) -> tuple[int, int]:
    """How many encoder layers of a model are ours, and how many it has."""
    ours = type(ROWS[LAYER].example)
    layers = [m for m in model.modules() if any(ALIASES.get(b.__name__, b.__name__) == LAYER for b in type(m).__mro__)]
    return sum(isinstance(layer, ours) for layer in layers), len(layers)


def _selected(ops: Iterable[str] | None) -> set[str]:
    """The names of the rows that serve the ops."""
    if ops is None:
        return set(ROWS)
    if isinstance(ops, str):
        raise TypeError(f"ops: wanted a collection of names, got the string {ops!r}")
    ops = set(ops)
    known = {op for row in ROWS.values() for op in row.ops}
    if ops - known:
        raise ValueError(f"ops: wanted names among {listed(known)}, got {listed(ops - known)}")
    return {name for name, row in ROWS.items() if ops & set(row.ops)}


def _changes(module: nn.Module, match: Match) -> dict[str, Any]:
    """The attributes that a swap changes, with their new values."""
    row = match.row
    values = {name: value(module) for name, value in row.adds.items() if not hasattr(module, name)}
    values |= {name: value(module) for name, value in row.replaces.items()}
    values |= match.settings | dict.fromkeys(row.drops, MISSING)
    values[ORIGINAL] = _Original(type(module), {name: vars(module).get(name, MISSING) for name in values})
    return values


def _change(module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Gives a module another class and other plain attributes; MISSING stands for none."""
    module.__class__ = cls
    if cls is Zipformer:
        join_interface(module)
    for name, value in attributes.items():
        if value is MISSING:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = value
