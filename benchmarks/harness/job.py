"""One piece of work and the peers that do it, and the rows that measuring it gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import memory, statistics
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.peers import Prepared, Run, attempt
from benchmarks.harness.process import Apart, ask, end
from benchmarks.harness.timing import replays, take_turns

KEY = ("benchmark", "case", "direction", "dtype")
"""What names a job in a results file."""

USAGE = {"peak_bytes": memory.peak_bytes, "launches": memory.launches}


@dataclass
class Measured:
    """What measuring jobs gave: rows of numbers, and rows that say what was not measured and why.

    Attributes:
        rows: numbers, one row for each peer that was timed.
        skipped: peers that cannot do the work here.
        failed: peers that raised something, or died; or what of them could not be had.
        wrong: peers whose results are off.
        profile: where the time goes.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """Takes in what another measurement gave."""
        for part in fields(self):
            getattr(self, part.name).extend(getattr(other, part.name))
        complete(self.rows)


def complete(rows: list[dict[str, Any]]) -> None:
    """Adds to `times_as_long` the peers of the same job that took no turns with a row's: the ratio of the medians."""
    for row in rows:
        for other in rows:
            if other is not row and all(other[name] == row[name] for name in KEY):
                row["times_as_long"].setdefault(other["peer"], other["median_s"] / row["median_s"])


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        benchmark: which benchmark it belongs to: an op's name, or one of `suite.MODELS`.
        case: which sizes.
        direction: ``forward``, ``backward``, ``both`` or ``step``.
        dtype: of the data.
        peers: names of all that do this work somewhere; ours and upstream's and others'. The others are checked
            against the first.
        prepare: from the peers wanted to the functions that run here.
        bytes: the fewest bytes that must pass through memory, where known.
        flops: floating-point operations, where known.
        rounds: how many times each peer runs at least.
        seconds: how long the rounds go on at least.
        graphs: peers that on a GPU are timed as the replay of a CUDA graph, if they can be captured.
        apart: whether on a CPU each peer runs in a process of its own. `prepare` must pickle then.
    """

    benchmark: str
    case: str
    direction: str
    dtype: torch.dtype
    peers: tuple[str, ...]
    prepare: Callable[[Sequence[str]], Prepared]
    bytes: int | None = None
    flops: int | None = None
    rounds: int = 7
    seconds: float = 1.0
    graphs: tuple[str, ...] = ()
    apart: bool = False

    @property
    def key(self) -> dict[str, str]:
        """What names the work in a results file."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"benchmark": self.benchmark, "case": self.case, "direction": self.direction, "dtype": dtype}

    @property
    def title(self) -> str:
        """One line for people."""
        dtype = "" if self.dtype == torch.float32 else f", {self.key['dtype']}"
        return f"{self.benchmark}: {self.case}, {self.direction}{dtype}"

    def measure(self, rates: dict[str, Any], peers: Sequence[str] | None = None) -> Measured:
        """Prepares, checks and times the peers in turns. What one raises ends that one only.

        Args:
            rates: the machine's, from `rates.measure`.
            peers: which of them; all by default.
        Returns:
            A row for each peer that ran: the key, ``peer``, ``samples_s``, ``median_s``, ``interval_s`` (of the median,
            95%), ``spread_s`` (between quartiles), ``p95_s``, ``bytes``, ``flops`` and from them ``bytes_per_s``,
            ``flops_per_s``, ``of_copy`` and ``of_matrix`` (shares of the machine's rates), ``peak_bytes``,
            ``launches`` (None where they could not be counted), ``graph`` (whether a CUDA graph was timed),
            ``times_as_long``: for every other peer, how many times longer it takes, and ``unchecked`` where the peer
            was not checked: why.
        """
        asked = tuple(self.peers if peers is None else peers)
        found, reason = attempt(self.measured, rates, asked)
        return found if reason is None else self.all_failed(asked, reason)

    def all_failed(self, peers: Sequence[str], reason: str) -> Measured:
        """What a job gave that failed as a whole."""
        return Measured(failed=self.reasons(dict.fromkeys(peers, reason)))

    def reasons(self, found: dict[str, str]) -> list[dict[str, str]]:
        """Rows that say why peers have no numbers."""
        return [{**self.key, "peer": peer, "reason": reason} for peer, reason in found.items()]

    def measured(self, rates: dict[str, Any], peers: Sequence[str]) -> Measured:
        """`measure`, in which what no single peer is to blame for is raised."""
        prepared = self.prepare(tuple(dict.fromkeys((self.peers[0], *peers))))
        prepared.keep(peers)
        found = Measured(
            skipped=self.reasons(prepared.skipped),
            failed=self.reasons(prepared.failed),
            wrong=self.reasons(prepared.wrong),
        )
        with self._seats(prepared, found) as runs:
            self._time(runs, prepared.unchecked, rates, found)
        return found

    def _time(self, runs: dict[str, Run], unchecked: dict[str, str], rates: dict[str, Any], found: Measured) -> None:
        """Times the functions in turns and adds their rows, and why others have none, to what is found."""

        def fails(what: str, peer: str, reason: str) -> None:
            found.failed += self.reasons({peer: what + reason})

        capturable = {peer: run for peer, run in runs.items() if peer in self.graphs}
        graphs = replays(capturable, partial(fails, "its CUDA graph: "))
        timed = runs | graphs

        def drops(peer: str, reason: str) -> None:
            end(runs.pop(peer))
            graphs.pop(peer, None)
            fails("", peer, reason)

        samples = take_turns(timed, seconds=self.seconds, least=self.rounds, on_failure=drops)
        for peer, times in samples.items():
            others = {name: statistics.ratio(theirs, times) for name, theirs in samples.items() if name != peer}
            usage: dict[str, Any] = {}
            for name, count in USAGE.items():
                usage[name], reason = attempt(ask, count, runs[peer])
                if reason is not None:
                    fails(f"its {name}: ", peer, reason)
            usage["graph"] = peer in graphs
            numbers = figures(times, self.bytes, self.flops, self.key["dtype"], rates)
            why = {"unchecked": unchecked[peer]} if peer in unchecked else {}
            found.rows.append({**self.key, "peer": peer, **numbers, **usage, "times_as_long": others, **why})

    @contextlib.contextmanager
    def _seats(self, prepared: Prepared, found: Measured) -> Iterator[dict[str, Run]]:
        """What is timed: the functions prepared, or, where peers run apart, the same ones in their processes."""
        if not self.apart or DEVICE.type != "cpu":
            yield prepared.runs
            return
        peers = list(prepared.runs)
        prepared.runs.clear()  # they were for the check alone, and hold whole models
        with contextlib.ExitStack() as processes:
            seats = {}
            for peer in peers:
                seat, reason = attempt(Apart, self.prepare, peer)
                if reason is None:
                    seats[peer] = processes.enter_context(seat)
                else:
                    found.failed += self.reasons({peer: reason})
            yield seats


def figures(
    times: Sequence[float], moved: int | None, flops: int | None, dtype: str, rates: dict[str, Any]
) -> dict[str, Any]:
    """What one peer's samples say, by themselves and against the machine's rates."""
    middle = statistics.median(times)
    matrix = rates["matrix_flops_per_s"].get(dtype)
    bytes_per_s = moved / middle if moved else None
    flops_per_s = flops / middle if flops else None
    return {
        "median_s": middle,
        "interval_s": list(statistics.median_interval(times)),
        "spread_s": statistics.spread(times),
        "p95_s": statistics.percentile(times, 0.95),
        "bytes": moved,
        "flops": flops,
        "bytes_per_s": bytes_per_s,
        "flops_per_s": flops_per_s,
        "of_copy": bytes_per_s / rates["copy_bytes_per_s"] if bytes_per_s else None,
        "of_matrix": flops_per_s / matrix if flops_per_s and matrix else None,
        "samples_s": list(times),
    }


def off_by(actual: Tensor, expected: Tensor) -> float:
    """The relative error of a tensor, in the Euclidean norm."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
