"""Peak memory and launches of a function, by torch's profiler."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.machine import DEVICE, synchronize


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that torch's allocator held during the call above what it held before, results included."""
    synchronize()
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    del result
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        peak = max(peak, held)
    return peak


def launches(run: Callable[[], Any]) -> int | None:
    """How many kernels, copies and fills the call starts on a GPU; None on a CPU, which launches nothing."""
    if DEVICE.type != "cuda":
        return None
    with quiet(), profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type() == on_gpu for event in recorded.profiler.kineto_results.events())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The profiler of some builds of torch writes a line at its start and end past Python, to the process's stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
