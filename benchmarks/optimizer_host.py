"""What a step of ScaledAdam costs the CPU, beside the kernels: Python, and torch's questions about each tensor.

``python benchmarks/optimizer_host.py [--output FILE] [--label NAME]`` steps the 863 parameters of preset L with
launchers that do nothing. On a GPU such a step is 1.2 to 1.8 ms of kernels, and a host that takes longer holds them up.
Gradients are either the tensors of the step before, as with `zero_grad(set_to_none=False)`, or new ones of a backward
pass, which torch makes Python objects for while the step asks for them. Tensors are small, for nobody reads them. The
copy of the table to a GPU, some tens of microseconds, is not in the numbers. A file that is there keeps what it has
under other labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness.machine import environment  # noqa: E402
from zipformer_kernels import use_backend  # noqa: E402
from zipformer_kernels.core import backend  # noqa: E402
from zipformer_kernels.ops.scaled_adam.cases import parameters  # noqa: E402
from zipformer_kernels.optim import ScaledAdam  # noqa: E402

ROUNDS = 300
WARM_UP = 20
GRADIENTS = ("the same tensors every step", "new tensors every step")


class Idle:
    """The compiled module, but for the optimizer's kernels, which do nothing."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        kernel = name.startswith("scaled_adam_") and name.endswith("_cpu")
        value = (lambda *_, **__: None) if kernel else getattr(self._module, name)
        setattr(self, name, value)  # found without this function from now on
        return value


def small_parameters() -> list[nn.Parameter]:
    """As many as preset L has, of as many dimensions each."""
    return [nn.Parameter(torch.randn([min(size, 3) for size in shape])) for shape in parameters("L")]


def renew(params: list[nn.Parameter]) -> None:
    """Gives all parameters gradients by a backward pass, as training does."""
    for p in params:
        p.grad = None
    torch.cat([p.flatten() for p in params]).sum().backward()


def measure(before_step: Callable[[list[nn.Parameter]], None]) -> dict[str, float]:
    """Microseconds of a step: the median, and the fastest and slowest tenth."""
    params = small_parameters()
    optimizer = ScaledAdam(params, lr=0.045, clipping_scale=2.0)
    renew(params)
    samples = []
    with mock.patch.object(backend, "native", Idle(backend.native)), use_backend("cpu"):
        for i in range(WARM_UP + ROUNDS):
            before_step(params)
            begin = time.perf_counter()
            optimizer.step()
            if i >= WARM_UP:
                samples.append(1e6 * (time.perf_counter() - begin))
    tenths = statistics.quantiles(samples, n=10)
    return {
        "median_us": round(statistics.median(samples), 1),
        "tenth_us": round(tenths[0], 1),
        "ninetieth_us": round(tenths[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/optimizer-host.json")
    parser.add_argument("--label", default="now")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = dict(zip(GRADIENTS, map(measure, (lambda params: None, renew)), strict=True))
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    kept[options.label] = {"tensors": len(parameters("L")), "environment": environment(), "step": results}
    options.output.write_text(json.dumps(kept, indent=1) + "\n")
    for name, row in results.items():
        print(f"{name}: {row}")


if __name__ == "__main__":
    main()
