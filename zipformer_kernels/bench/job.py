"""One piece of work and the peers that do it, and the rows that measuring it gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.bench import memory, statistics
from zipformer_kernels.bench.machine import DEVICE
from zipformer_kernels.bench.process import Apart, ask
from zipformer_kernels.bench.timing import Run, replays, take_turns

USAGE = {"peak_bytes": memory.peak_bytes, "launches": memory.launches}


@dataclass
class Prepared:
    """Peers that are ready to be timed, checked against each other, and why the others are not.

    Attributes:
        runs: a function without arguments for each peer.
        skipped: for each peer that cannot run here, why.
        wrong: for each peer whose results are off, by how much: it is not timed.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


@dataclass
class Measured:
    """What measuring jobs gave: rows of numbers, and rows that say what was not measured and why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """Takes in what another measurement gave."""
        for name in ("rows", "skipped", "wrong", "profile"):
            getattr(self, name).extend(getattr(other, name))


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        benchmark: which benchmark it belongs to: an op's name, or one of `suite.MODELS`.
        case: which sizes.
        direction: ``forward``, ``backward``, ``both`` or ``step``.
        dtype: of the data.
        peers: names of all that do this work somewhere; ours and upstream's and others'.
        prepare: from the peers wanted to the functions that run here.
        bytes: the fewest bytes that must pass through memory, where known.
        flops: floating-point operations, where known.
        rounds: how many times each peer runs at least.
        seconds: how long the rounds go on at least.
        graphs: whether on a GPU each peer can be replayed as a CUDA graph.
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
    graphs: bool = False
    apart: bool = False

    @property
    def key(self) -> dict[str, str]:
        """What names the work in a results file."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"benchmark": self.benchmark, "case": self.case, "direction": self.direction, "dtype": dtype}

    @property
    def title(self) -> str:
        """One line for people."""
        return f"{self.benchmark}: {self.case}, {self.direction}"

    def measure(self, rates: dict[str, Any], peers: Sequence[str] | None = None) -> Measured:
        """Prepares, checks and times the peers in turns.

        Args:
            rates: the machine's, from `rates.measure`.
            peers: which of them; all by default.
        Returns:
            A row for each peer that ran: the key, ``peer``, ``samples_s``, ``median_s``, ``interval_s`` (of the median,
            95%), ``spread_s`` (between quartiles), ``p95_s``, ``bytes``, ``flops`` and from them ``bytes_per_s``,
            ``flops_per_s``, ``of_copy`` and ``of_matrix`` (shares of the machine's rates), ``peak_bytes``,
            ``launches``, ``graph`` (whether a CUDA graph was timed), and ``times_as_long``: for every other peer, how
            many times longer it takes.
        """
        prepared = self.prepare(self.peers if peers is None else peers)
        found = Measured(
            skipped=[{**self.key, "peer": peer, "reason": reason} for peer, reason in prepared.skipped.items()],
            wrong=[{**self.key, "peer": peer, "reason": reason} for peer, reason in prepared.wrong.items()],
        )
        if not prepared.runs:
            return found
        graphs = replays(prepared.runs) if self.graphs else {}
        with self._seats(prepared) as runs:
            samples = take_turns(runs | graphs, seconds=self.seconds, least=self.rounds)
            for peer, times in samples.items():
                others = {name: statistics.ratio(theirs, times) for name, theirs in samples.items() if name != peer}
                usage = {name: ask(count, runs[peer]) for name, count in USAGE.items()}
                usage["graph"] = peer in graphs
                numbers = figures(times, self.bytes, self.flops, self.key["dtype"], rates)
                found.rows.append({**self.key, "peer": peer, **numbers, **usage, "times_as_long": others})
        return found

    @contextlib.contextmanager
    def _seats(self, prepared: Prepared) -> Iterator[dict[str, Run]]:
        """What is timed: the functions prepared, or, where peers run apart, the same ones in their processes."""
        if not self.apart or DEVICE.type != "cpu":
            yield prepared.runs
            return
        peers = list(prepared.runs)
        prepared.runs.clear()  # they were for the check alone, and hold whole models
        with contextlib.ExitStack() as processes:
            yield {peer: processes.enter_context(Apart(self.prepare, peer)) for peer in peers}


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
