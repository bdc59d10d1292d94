"""All benchmarks by name, and running them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zipformer_kernels.bench import (
    length,
    machine,
    model_jobs,
    op_jobs,
    optimizer,
    products,
    rates,
    results,
    shared_attention,
)
from zipformer_kernels.bench.job import Job, Measured
from zipformer_kernels.bench.process import fresh

MODELS: dict[str, Callable[[bool], Iterator[Job]]] = {
    "shared-attention": shared_attention.jobs,
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


def run(
    wanted: Sequence[str], folder: Path, every: bool, on_job: Callable[[Job | None, Measured], Any]
) -> dict[str, Measured]:
    """Runs benchmarks one after the other and writes a file for each to the folder as soon as it is done.

    On a CPU each of several runs in a process of its own: what one leaves of the heap changed the times of the next by
    several percent.

    Args:
        wanted: their names.
        folder: where the files go.
        every: all sizes.
        on_job: called after each job with it and what it gave.
    Returns:
        What each benchmark gave, by name.
    Raises:
        ValueError: there is no such benchmark.
        ResultsError: a file cannot be written.
        RuntimeError: a benchmark's process died.
    """
    planned = {name: jobs(name, every) for name in wanted}
    reached = rates.measure()
    found = {}
    for name, its_jobs in planned.items():
        found[name] = Measured()
        environment = machine.environment()
        with _process(apart=len(planned) > 1 and machine.DEVICE.type == "cpu") as call:
            for index, job in enumerate(its_jobs):
                try:
                    gave = call(_measure, name, every, index, reached)
                except BrokenProcessPool as error:
                    raise RuntimeError(f"{job.title}: the process that measured it died") from error
                found[name].add(gave)
                on_job(job, gave)
        if its_jobs:
            results.write(folder / f"{name}.json", results.content(name, environment, reached, found[name]))
    return found


@contextlib.contextmanager
def _process(apart: bool) -> Iterator[Callable[..., Any]]:
    """A function that calls others with their arguments, in this process or all in one fresh one."""
    if not apart:
        yield lambda function, *args: function(*args)
        return
    with fresh() as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _measure(name: str, every: bool, index: int, reached: dict[str, Any]) -> Measured:
    gave = jobs(name, every)[index].measure(reached)
    torch.compiler.reset()
    return gave
