"""The kernels that a function runs on the device, and how long they take, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.machine import DEVICE, synchronize
from benchmarks.harness.memory import quiet


def kernels_of(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """What runs on the device in one call, longest first: on a CPU torch's operations."""
    on_gpu = DEVICE.type == "cuda"
    with quiet(), profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        run()
        synchronize()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    where = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU  # not the host's launches
    events = [event for event in recorded.key_averages() if event.device_type == where]
    events.sort(key=lambda event: -getattr(event, time_of))
    return [{"name": event.key, "count": event.count, "ms": getattr(event, time_of) / 1e3} for event in events]
