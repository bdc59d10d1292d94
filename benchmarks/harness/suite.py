"""All benchmarks by name, and running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    length,
    machine,
    model_jobs,
    op_jobs,
    optimizer,
    products,
    rates,
    rel_pos_attention,
    results,
    shared_attention,
)
from benchmarks.harness.job import Job, Measured
from benchmarks.harness.peers import COMPILED, Prepared, Told, attempt
from benchmarks.harness.process import Worker

ON_GPU = machine.DEVICE.type == "cuda"

MODELS: dict[str, Callable[[bool], Iterator[Job]]] = {
    "shared-attention": shared_attention.jobs,
    "rel-pos-attention": rel_pos_attention.jobs,
    "scaled_adam": optimizer.jobs,
    "conv-embed": model_jobs.conv_embed,
    "encoder-forward": model_jobs.encoder_forward,
    "training-step": model_jobs.training_step,
    "streaming-chunk": model_jobs.streaming_chunk,
    "encoder-products": products.jobs,
    "length": length.jobs,
    "conformer": model_jobs.conformer,
}
"""What is measured besides ops: each name to a function from `every` to its jobs."""


def names() -> list[str]:
    """The benchmarks there are: the ops, then whole models."""
    return [*op_jobs.names(), *MODELS]


def jobs(name: str, every: bool = False) -> list[Job]:
    """A benchmark's jobs on this machine; all its sizes, or a few that show the most.

    Raises:
        ValueError: there is no such benchmark.
    """
    if name not in names():
        raise ValueError(f"benchmark: wanted one of {', '.join(names())}, got {name!r}")
    make = MODELS.get(name) or partial(op_jobs.jobs, name)
    return list(make(every))


@dataclass(frozen=True)
class Step:
    """Some peers of one job, which are measured together.

    Attributes:
        name: the benchmark.
        every: whether the job is one of all sizes.
        index: which of the benchmark's jobs.
        job: the job.
        peers: which of its peers.
    """

    name: str
    every: bool
    index: int
    job: Job
    peers: tuple[str, ...]


def steps(
    wanted: Sequence[str],
    every: bool = False,
    compiled: bool = True,
    compiled_last: bool = ON_GPU,
) -> list[Step]:
    """What is to be measured, in order.

    Args:
        wanted: the benchmarks' names.
        every: all sizes.
        compiled: also the peers that go through torch.compile.
        compiled_last: those one by one after all others, of all benchmarks: each may take minutes.
    Raises:
        ValueError: there is no such benchmark.
    """
    all_peers = [
        Step(name, every, index, job, job.peers)
        for name in wanted
        for index, job in enumerate(_jobs_or_reason(name, every))
    ]
    called = [replace(s, peers=tuple(p for p in s.peers if p not in COMPILED)) for s in all_peers]
    if not compiled:
        return [step for step in called if step.peers]
    if not compiled_last:
        return all_peers
    apart = [replace(s, peers=(p,)) for s in all_peers for p in s.peers if p in COMPILED]
    return [step for step in called if step.peers] + apart


def _jobs_or_reason(name: str, every: bool) -> list[Job]:
    """A benchmark's jobs; or, where they cannot be made, one that fails with the reason."""
    if name not in names():
        return jobs(name, every)
    made, reason = attempt(jobs, name, every)
    return made if reason is None else [Job(name, "", "", torch.float32, ("all",), partial(_raise, reason))]


def _raise(reason: str, wanted: Sequence[str]) -> Prepared:
    raise Told(reason)


def run(planned: Sequence[Step], folder: Path, on_step: Callable[[Step, Measured], Any]) -> dict[str, Measured]:
    """Measures step by step, and after each writes the file of its benchmark anew, with all that is known by then.

    Several benchmarks run apart from this process: on a CPU each in one of its own, for what one leaves of the heap
    changed the times of the next by several percent; on a GPU, where even a single one does, all in one, until a peer
    fails: it may have broken the device's context. Peers that failed beside others are then tried again, alone.

    Args:
        planned: the steps.
        folder: where the files go, one for each benchmark.
        on_step: called after each step with it and what it gave.
    Returns:
        What each benchmark gave, by name.
    Raises:
        ResultsError: a file cannot be written.
    """
    found: dict[str, Measured] = {}
    environments: dict[str, dict[str, Any]] = {}
    with Place(apart=ON_GPU or len({step.name for step in planned}) > 1) as place:
        reached = place.call(rates.measure)
        for step in planned:
            if step.name not in found:
                found[step.name], environments[step.name] = Measured(), machine.environment()
                if not ON_GPU:
                    place.renew()
            gave = _try(place, step, reached)
            found[step.name].add(gave)
            content = results.content(step.name, environments[step.name], reached, found[step.name])
            results.write(folder / f"{step.name}.json", content)
            on_step(step, gave)
    return found


class Place:
    """Where calls are made: in this process, or all in a fresh one until it is renewed."""

    def __init__(self, apart: bool) -> None:
        self.apart = apart
        self._worker: Worker | None = None

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.renew(at_once=kind is not None)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args). Raises `Failed` and `Died` where it is made apart."""
        if not self.apart:
            return function(*args)
        if self._worker is None:
            self._worker = Worker()
        return self._worker.call(function, *args)

    def renew(self, at_once: bool = False) -> None:
        """The next call finds a fresh process, where calls are made apart."""
        if self._worker is not None:
            self._worker.end(at_once)
            self._worker = None


def _try(place: Place, step: Step, reached: dict[str, Any]) -> Measured:
    """What a step gives, whatever happens to its process; peers that failed there among others are tried again."""
    gave, reason = attempt(place.call, _measure, step.name, step.every, step.index, reached, step.peers)
    if reason is not None:
        gave = step.job.all_failed(step.peers, reason)
    if not gave.failed or not place.apart:
        return gave
    place.renew(at_once=True)
    timed = {row["peer"] for row in gave.rows}
    again = dict.fromkeys(row["peer"] for row in gave.failed if row["peer"] not in timed)
    for peer in again if len(step.peers) > 1 else ():
        gave.failed = [row for row in gave.failed if row["peer"] != peer]
        gave.add(_try(place, replace(step, peers=(peer,)), reached))
    return gave


def _measure(name: str, every: bool, index: int, reached: dict[str, Any], peers: Sequence[str]) -> Measured:
    gave = jobs(name, every)[index].measure(reached, peers)
    torch.compiler.reset()
    return gave
