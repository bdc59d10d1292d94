"""Times functions in turns, so that whatever else the machine does falls on all of them alike.

On a CPU by the clock. On a GPU by events, each run after the L2 cache was overwritten. `replays` turns functions into
CUDA graphs, so that the kernels are timed and not Python.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from zipformer_kernels.bench.machine import DEVICE
from zipformer_kernels.bench.process import ask

Run = Callable[[], Any]
WARM_UP = 2


def take_turns(runs: dict[str, Run], *, seconds: float, least: int) -> dict[str, list[float]]:
    """Seconds of every run of every function.

    Args:
        runs: the functions by name.
        seconds: rounds go on until so much time has passed,
        least: but there are at least so many.
    """
    if DEVICE.type == "cuda":
        return _gpu(runs, seconds, least)
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            samples[name].append(ask(by_the_clock, run))
        rounds += 1
    return samples


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


def replays(runs: dict[str, Run]) -> dict[str, Run]:
    """Replays of those functions that can be captured, on a GPU; none elsewhere."""
    found = {}
    for name, run in runs.items() if DEVICE.type == "cuda" else ():
        try:
            found[name] = captured(run)
        except RuntimeError as reason:
            warnings.warn(f"{name} is timed without a CUDA graph: {str(reason).splitlines()[0]}", stacklevel=2)
    return found


def _gpu(runs: dict[str, Run], seconds: float, least: int) -> dict[str, list[float]]:
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    cache = torch.empty(4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size, dtype=torch.int8, device=DEVICE)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
            cache.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) / 1e3)
        rounds += 1
    return samples
