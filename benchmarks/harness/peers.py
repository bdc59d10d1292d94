"""Peers that do one piece of work: made ready one by one, so that what one cannot do ends that one only."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]

COMPILED = frozenset({"compiled", "upstream compiled", "upstream as shipped", "flex_attention"})
"""Peers that go through torch.compile, which can take minutes for a whole model."""

OURS = frozenset({"cpu", "triton", "cuda", "ours", "ours, CUDA graph", "ours, bf16 weights"})
"""Peers whose failure is this package's."""


class Told(RuntimeError):
    """What happened to a peer. The message is the whole reason, in one line."""


class Unserved(Told):
    """A peer cannot do this work here."""


class Wrong(Told):
    """A peer's results are off."""


@dataclass
class Prepared:
    """Peers that are ready to be timed, checked against each other, and why the others are not.

    Attributes:
        runs: a function without arguments for each peer.
        skipped: for each peer that cannot run here, why.
        failed: for each peer that raised something, what.
        wrong: for each peer whose results are off, by how much: it is not timed.
        unchecked: for each peer that is timed and was not checked, why.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)

    def keep(self, wanted: Iterable[str]) -> None:
        """Leaves out all peers but these."""
        for table in (self.runs, self.skipped, self.failed, self.wrong, self.unchecked):
            for peer in table.keys() - set(wanted):
                del table[peer]


class Agreement:
    """Whether peers agree: the results of the first that runs are what the others' are held against.

    Args:
        off: the relative error of results, given them and the ones expected.
        limit: the largest that passes.
        reference: the peer that should come first. Where another does, that one is not checked.
    """

    def __init__(self, off: Callable[..., float], limit: float, reference: str) -> None:
        self._off, self._limit, self._reference = off, limit, reference
        self._first: tuple[str, Any] | None = None
        self.unchecked: dict[str, str] = {}

    def check(self, peer: str, results: Any, **how: Any) -> None:
        """Raises `Wrong` where a peer's results are off; `how` goes to the function that compares."""
        if self._first is None:
            self._first = peer, results
            if peer != self._reference:
                self.unchecked[peer] = f"{self._reference} does not run here; the others are checked against this"
            return
        first, expected = self._first
        error = self._off(results, expected, **how)
        if not error <= self._limit:  # nor is NaN right
            raise Wrong(f"it is off by {error:.1e} from {first}")


def prepare(wanted: Iterable[str], make: Callable[[str], Run], agreement: Agreement | None = None) -> Prepared:
    """Makes peers ready one after the other.

    Args:
        wanted: the peers.
        make: a peer's function. It raises `Unserved` or `Wrong`, or whatever else happens to the peer.
        agreement: what `make` checks the peers with.
    """
    prepared = Prepared(unchecked=agreement.unchecked if agreement else {})
    for peer in wanted:
        try:
            run, reason = attempt(make, peer, passing=(Unserved, Wrong))
        except Unserved as unserved:
            prepared.skipped[peer] = str(unserved)
        except Wrong as wrong:
            prepared.wrong[peer] = str(wrong)
        else:
            if reason is None:
                prepared.runs[peer] = run
            else:
                prepared.failed[peer] = reason
    return prepared


def attempt(work: Callable[..., Any], *args: Any, passing: tuple[type[Exception], ...] = ()) -> tuple[Any, str | None]:
    """work(*args) and None; or None and what was raised, as `told` says it, and the memory that it held is free again.

    Exceptions of the types `passing` are raised on, as is what ends the program, such as KeyboardInterrupt.
    """
    try:
        return work(*args), None
    except passing:
        raise
    except Exception as error:
        reason = told(error)
    free()  # not before: the error's traceback holds the tensors of the frames it passed
    return None, reason


def free() -> None:
    """Gives back memory that nobody holds any more, the GPU's too."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a broken context, which whoever uses the device next will tell
            torch.cuda.empty_cache()


def told(error: BaseException) -> str:
    """An exception in one line: its type and its first line; that memory ran out is said plainly."""
    if isinstance(error, Told):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["without a message"]
    text = f"{type(error).__name__}: {' '.join(lines[: 2 if lines[0].endswith(':') else 1])}"
    return f"it runs out of memory: {text}" if out_of_memory(error) else text


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; torch has no type of its own for it on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text)
