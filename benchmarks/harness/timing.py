"""Times functions in turns, so that whatever else the machine does falls on all of them alike.

On a CPU by the clock. On a GPU by events, each run after the L2 cache was overwritten. `replays` turns functions into
CUDA graphs, so that the kernels are timed and not Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.harness.machine import DEVICE
from benchmarks.harness.peers import Run, attempt
from benchmarks.harness.process import ask

WARM_UP = 2
OnFailure = Callable[[str, str], Any]


def take_turns(
    runs: dict[str, Run], *, seconds: float, least: int, on_failure: OnFailure | None = None
) -> dict[str, list[float]]:
    """Seconds of every run of every function.

    Args:
        runs: the functions by name. Those that raise something are taken out of it.
        seconds: rounds go on until so much time has passed,
        least: but there are at least so many.
        on_failure: called with the name of a function that raised something, and with what. None: nobody looks.
    Returns:
        The times of those functions that took every turn.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}

    def each(measure: Callable[[Run], Any]) -> Iterator[tuple[str, Any]]:
        for name in list(runs):
            seconds, reason = attempt(measure, runs[name])
            if reason is None:
                yield name, seconds
                continue
            del runs[name], samples[name]
            if on_failure is not None:
                on_failure(name, reason)

    measure = _by_events() if DEVICE.type == "cuda" else partial(ask, by_the_clock)
    for _ in each(_warm_up):
        pass
    start, rounds = time.perf_counter(), 0
    while runs and (rounds < least or time.perf_counter() - start < seconds):
        for name, taken in each(measure):
            samples[name].append(taken)
        rounds += 1
    return samples


def times(run: Run, rounds: int) -> list[float]:
    """Seconds of so many runs of one function. Raises RuntimeError where it raises anything."""
    failures: list[str] = []
    samples = take_turns({"": run}, seconds=0.0, least=rounds, on_failure=lambda _, reason: failures.append(reason))
    if failures:
        raise RuntimeError(failures[0])
    return samples[""]


def by_the_clock(run: Run) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def captured(run: Run) -> Run:
    """The replay of a CUDA graph of the function, which returns what it returned, written anew by each replay.

    Raises:
        RuntimeError: the function does something that no graph can hold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def replays(runs: dict[str, Run], on_failure: OnFailure) -> dict[str, Run]:
    """Replays of those functions that can be captured, on a GPU; none elsewhere."""
    found = {}
    for name, run in runs.items() if DEVICE.type == "cuda" else ():
        replay, reason = attempt(captured, run)
        if reason is None:
            found[name] = replay
        else:
            on_failure(name, reason)
    return found


def _warm_up(run: Run) -> None:
    for _ in range(WARM_UP if DEVICE.type == "cuda" else 1):
        run()


def _by_events() -> Callable[[Run], float]:
    """A function that gives the seconds of one run on the GPU, begun with a cold L2 cache."""
    cache = torch.empty(4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size, dtype=torch.int8, device=DEVICE)

    def measure(run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        cache.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return measure
