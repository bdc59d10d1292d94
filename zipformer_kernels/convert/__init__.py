"""Swaps the modules of a model built from upstream's classes for ours, in place, and back.

A swap gives the module object our class and leaves it the same object: attributes, parameters, buffers, children,
hooks and the training flag are not copied but stay where they are. So everything that refers to them stays valid:
optimizers, ``state_dict`` keys, checkpoints, a DistributedDataParallel around the model, modules used in two
places, and the model itself where it is one of those swapped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from zipformer_kernels.convert.digest import Digests
from zipformer_kernels.convert.recognise import ALIASES, recognise
from zipformer_kernels.convert.report import Report
from zipformer_kernels.convert.rows import ROWS, listed
from zipformer_kernels.convert.swap import ORIGINAL, Match, change, changes, swap_back
from zipformer_kernels.convert.trial import BATCH, Trials, difference, outputs

__all__ = ["Report", "convert", "revert"]

LAYER = "ZipformerEncoderLayer"


def convert(
    model: nn.Module,
    ops: Iterable[str] | None = None,
    *,
    check: BATCH | None = None,
    trust: Collection[str | type[nn.Module]] = (),
) -> Report:
    """Swaps, in place, every module of `model` that does what a class of ours does for ours.

    The model may hold modules of the package ``zipformer``, of an icefall recipe or of ZipVoice, or copies of them.
    They are recognised by what their methods do, whatever they are called: by a digest of the source of every method,
    with the helpers, constants and bases that it uses, and by attributes, children and shapes. Known versions that do
    something else than today's are swapped with the settings that make ours do the same. Whatever is unknown, such as a
    forward that someone has edited, is not swapped, but called as before and reported. Where a source cannot be had, a
    small run of a copy before and after the swap decides.

    Afterwards ``isinstance`` sees our classes. A pickled copy of the model needs this package and not
    upstream, and cannot be reverted; a deep copy can. Swapping twice does nothing more.

    Args:
        model: the model, or any part of one.
        ops: the ops to swap modules for: any of "swoosh", "bias_norm", "swoosh_linear", "attention",
            "nonlin_attention". By default all, and every module of upstream's besides.
        check: arguments of the model, a tuple or by name in a dict. Its outputs for them, in evaluation, are compared
            before and after; where they differ everything is swapped back, and the report's `check` says so.
        trust: classes, or names of classes, whose unknown methods are said to do what upstream's do.

    Returns:
        What was swapped, and what was not and why.

    Raises:
        TypeError: `model` is not a module, `ops` or `trust` a single string, or `check` no tuple, list or dict.
        ValueError: there is no such op.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    if isinstance(trust, str):
        raise TypeError(f"trust: wanted a collection of classes or names, got the string {trust!r}")
    if not (check is None or isinstance(check, tuple | list | dict)):
        raise TypeError(f"check: wanted the model's arguments in a tuple or a dict, got {type(check).__name__}")
    rows = _selected(ops)
    report = Report()
    known = trust, Digests(), Trials()
    matches = {module: (path, recognise(module, *known)) for path, module in model.named_modules()}
    swaps: list[tuple[nn.Module, Match]] = []
    for module, (path, match) in matches.items():
        if match is None or match.name not in rows:
            continue
        name = type(module).__name__
        if match.reason is None:
            report.swapped.append((path, name))
            swaps.append((module, match))
        else:
            report.not_swapped.append((path, name, match.reason))
    expected = None if check is None else outputs(model, check)
    prepared = [(module, type(match.row.example), changes(module, match)) for module, match in swaps]
    for swap in prepared:  # only now, so that an error leaves the model whole
        change(*swap)
    if check is None:
        return Report(report.swapped, report.not_swapped, _layers(model))
    try:
        error, reason = difference(outputs(model, check), expected)
    except Exception as raised:
        error, reason = 0.0, f"it raises {type(raised).__name__}: {raised}"
    if reason is None:
        return Report(report.swapped, report.not_swapped, _layers(model), f"outputs agree to {error:.1e} of their RMS")
    for module, _ in swaps:
        swap_back(module)
    return Report([], report.not_swapped, _layers(model), f"everything was swapped back: {reason}")


def revert(model: nn.Module) -> Report:
    """Undoes `convert`: every module it swapped gets back its class and the attributes the swap had changed.

    What training has changed since (parameters, batch counts, the state of a Whiten) stays.

    Args:
        model: the model, or any part of one.

    Returns:
        What was swapped back, and what was not: modules that were pickled, and so forgot what they were.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for path, module in model.named_modules():
        if ORIGINAL not in vars(module):
            continue
        if getattr(module, ORIGINAL) is None:
            report.not_swapped.append((path, type(module).__name__, "it was pickled since it was swapped"))
            continue
        swap_back(module)
        report.swapped.append((path, type(module).__name__))
    return Report(report.swapped, report.not_swapped, _layers(model))


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
