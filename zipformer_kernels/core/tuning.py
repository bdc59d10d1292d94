"""Reads thresholds and tile sizes, and overrides them for measuring.

`zipformer_kernels.core.tuned` has the table. Who needs a number takes its entry once, and reads its value
at every use::

    STORED_BYTES = tuning.entry("attention.stored_bytes")
    ...
    if size < STORED_BYTES.value:

Two roads lead to another value. It holds in the whole process, and results agree up to rounding whatever it is::

    with tuning.override(**{"attention.stored_bytes": 0}):
        measure()

    ZIPFORMER_KERNELS_TUNING="attention.stored_bytes=0,linear.few_rows=0" python measure.py

The variable is read when this module is imported. Several numbers are written with x: ``64x16x4x64x3``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zipformer_kernels.core.tuned import ENTRIES, Entry, Value

VARIABLE = "ZIPFORMER_KERNELS_TUNING"

_by_name = {one.name: one for one in ENTRIES}


def entries() -> list[Entry]:
    """All entries of the table, in its order."""
    return list(ENTRIES)


def entry(name: str) -> Entry:
    """The entry of this name. Raises ValueError if there is none."""
    found = _by_name.get(name)
    if found is None:
        near = difflib.get_close_matches(name, _by_name, n=3, cutoff=0)
        raise ValueError(
            f"tuning has no entry {name!r}; the nearest are {', '.join(near)}, and `zipformer-kernels info --tuning` "
            "lists all"
        )
    return found


@contextmanager
def override(**values: Value) -> Iterator[None]:
    """Within the block entries have other values, in all threads.

    Args:
        **values: numbers by the entries' names; a tuple where an entry has several.
    Raises:
        ValueError: there is no such entry, or it cannot have such a value. Nothing is changed then.
    """
    checked = [(entry(name), _checked(entry(name), value)) for name, value in values.items()]
    before = [(one, one.value) for one, _ in checked]
    _set(checked)
    try:
        yield
    finally:
        _set(before)


def _set(values: list[tuple[Entry, Value]]) -> None:
    for one, value in values:
        object.__setattr__(one, "value", value)


def _checked(one: Entry, value: Any) -> Value:
    """The value as the entry has it. Raises ValueError."""
    several = isinstance(one.default, tuple)
    numbers = tuple(value) if several and isinstance(value, tuple | list) else (value,)
    fits = len(numbers) == (len(one.default) if several else 1) and all(_fits(one, number) for number in numbers)
    if not fits:
        raise ValueError(f"{one.name}: wanted {_wanted(one)}, got {value!r}")
    return numbers if several else numbers[0]


def _fits(one: Entry, number: Any) -> bool:
    if not isinstance(number, int) or isinstance(number, bool) or number < one.least:
        return False
    return not one.power_of_two or number & (number - 1) == 0


def _wanted(one: Entry) -> str:
    kind = "a power of two" if one.power_of_two else f"a whole number of {one.least} or more"
    if isinstance(one.default, tuple):
        return f"{len(one.default)} whole numbers of {one.least} or more ({one.unit})"
    return f"{kind} ({one.unit})"


def parse(text: str) -> dict[str, Value]:
    """The overrides in a text like that of the environment variable: ``name=value,name=value``.

    Raises:
        ValueError: it is no such text, or names an entry or a value that cannot be.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, written = part.partition("=")
        if not equals:
            raise ValueError(f"{VARIABLE}: wanted name=value,name=value, got {part!r}")
        one = entry(name.strip())
        try:
            numbers = tuple(map(int, written.split("x")))
        except ValueError:
            raise ValueError(f"{one.name}: wanted {_wanted(one)}, got {written!r}") from None
        found[one.name] = _checked(one, numbers if len(numbers) > 1 else numbers[0])
    return found


_set([(entry(name), value) for name, value in parse(os.environ.get(VARIABLE, "")).items()])
