"""What the machine reaches on a large copy and on large square matrix products, to hold kernels against."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness.machine import DEVICE
from benchmarks.harness.peers import Run
from benchmarks.harness.statistics import median
from benchmarks.harness.timing import times

DTYPES = (torch.float32, torch.bfloat16)


def measure() -> dict[str, Any]:
    """Both rates of this machine, of products by dtype."""
    return {
        "copy_bytes_per_s": copy_rate(),
        "matrix_flops_per_s": {str(dtype).removeprefix("torch."): matrix_rate(dtype) for dtype in DTYPES},
    }


def copy_rate(size: int = 1 << 29) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes from memory to memory."""
    source = torch.ones(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / _faster_half(lambda: target.copy_(source))


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of random square matrices."""
    n = 8192 if DEVICE.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in "ab")
    return 2 * n**3 / _faster_half(lambda: a @ b)


def _faster_half(run: Run, rounds: int = 10) -> float:
    """The median of the faster half of the times: what the machine can do, not what disturbed it."""
    return median(sorted(times(run, rounds))[: rounds // 2])
