"""Each kernel at preset L's four shapes, 30 x 30 s, in the model's dtype: microseconds, and the share of the copy rate.

``python table.py OUT.json [--seconds N] [OP ...]``. Ops run as CUDA graphs, so that no Python stands between kernels,
each run after the L2 cache was overwritten. ``both`` is forward and backward. Two rows come first that the others are
read against: a copy, and a product of large matrices. Without a GPU small cases are timed, to try the stage itself.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.found import Found, ends
from benchmarks.gpu.kernels import kernels_of
from benchmarks.harness import statistics
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.op_jobs import RESIDUAL, Passes
from benchmarks.harness.peers import Run, Unserved, attempt
from benchmarks.harness.timing import captured, take_turns
from zipformer_kernels import ops
from zipformer_kernels.core import backend
from zipformer_kernels.ops.cases import Case

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16  # the model's, by autocast
BACKENDS = ("cuda", "triton", "eager") if ON_GPU else ("cpu", "eager")
ROUNDS, SECONDS = 15, 0.1  # of each row


def main() -> int:
    """Times all there is time for; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("ops", nargs="*", help="these only; all by default")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing after so long")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    found = Found(arguments.output, "table")
    ceilings(found)
    for row in rows(arguments.ops or ops.names()):
        if time.monotonic() > end:
            print("no time for the rest")
            break
        add(found, row)
    return int(any("failed" in row for row in found.rows))


def ceilings(found: Found) -> None:
    """What the device reaches: bytes a second of a copy, FLOPs a second of a product."""
    size = 1 << (28 if ON_GPU else 22)
    x = torch.randn(size, device=DEVICE)
    y = torch.empty_like(x)
    add_time(found, {"op": "copy", "case": f"{x.nbytes >> 20} MiB", "bytes": 2 * x.nbytes}, partial(y.copy_, x))
    n = 8192 if ON_GPU else 512
    a, b = (torch.randn(n, n, device=DEVICE).to(DTYPE) for _ in "ab")
    add_time(found, {"op": "product", "case": f"{n} x {n} x {n}", "flops": 2 * n**3}, partial(torch.matmul, a, b))


def rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """What is to be timed: the longest sequences of all ops first, for they say most."""
    listed = {name: importlib.import_module(f"{ops.__name__}.{name}.cases").CASES for name in names}
    chosen = {name: [case for case in cases if is_timed(case)] for name, cases in listed.items()}
    for i in range(max(map(len, chosen.values()))):
        for name in names:
            for case, where in itertools.product(chosen[name][i : i + 1], BACKENDS):
                if where in ops.get(name).backends and backend.missing[where] is None:
                    yield {"op": name, "backend": where, "case": case}


def is_timed(case: Case) -> bool:
    """Whether a case is one of preset L's; without a GPU, whether it is small."""
    real = case.name.startswith("L ") or case.name.endswith(" of L")
    return case.large and real if ON_GPU else not case.large


def dtype_of(op: str) -> torch.dtype:
    """What the model runs an op in: the residual stream and the optimizer stay in float32."""
    return torch.float32 if op in (*RESIDUAL, "scaled_adam") else DTYPE


def add(found: Found, row: dict[str, Any]) -> None:
    """Times one op's case: forward, and forward and backward; or a step. Backward is the difference."""
    case, operation, where = row["case"], ops.get(row["op"]), row["backend"]
    dtype = dtype_of(row["op"])
    key = row | {"case": case.name, "dtype": str(dtype).removeprefix("torch.")}
    torch.manual_seed(0)
    try:
        runs, reason = attempt(prepared, operation, where, case, dtype, passing=(Unserved,))
    except Unserved as unserved:
        found.add(f"{title(key)}: {unserved}", **key, skipped=str(unserved))
        return
    if reason is not None:
        found.add(f"{title(key)}: {reason}", **key, failed=reason)
        return
    medians = {}
    for direction, run in runs.items():
        parts = ("forward", "backward") if direction == "both" else (direction,)
        work = {"bytes": sum(case.bytes(dtype.itemsize)[part] for part in parts)}
        work["flops"] = sum(case.flops[part] for part in parts)
        if ON_GPU and direction != "forward":
            work["kernels"], reason = attempt(kernels_of, run)
            work |= {} if reason is None else {"not_profiled": reason}
        medians[direction] = add_time(found, key | {"direction": direction} | work, run)
    if None not in medians.values() and medians.get("both", 0) > medians.get("forward", 0):
        work = {"bytes": case.bytes(dtype.itemsize)["backward"], "flops": case.flops["backward"]}
        told(found, key | {"direction": "backward"} | work, medians["both"] - medians["forward"])


def prepared(operation: Any, where: str, case: Case, dtype: torch.dtype) -> dict[str, Run]:
    """What is to be timed, by direction. Raises `Unserved` where the backend does not take the case."""
    args = case.inputs(dtype, DEVICE)
    reason = operation.unsupported(where, *args)
    if reason is not None:
        raise Unserved(reason)
    if not hasattr(operation, "reference"):
        memory: dict[Any, Any] = {}
        return {"step": lambda: operation.backends[where].step(*args, None, None, None, memory)}
    passes = Passes(partial(operation, backend=where), args)
    passes.results()
    return {"forward": passes.forward, "both": passes.both}


def add_time(found: Found, key: dict[str, Any], run: Run) -> float | None:
    """Adds the row of a function that runs; its median in seconds, or None if it failed."""
    samples, reason = attempt(sample, run)
    if reason is not None:
        found.add(f"{title(key)}: {reason}", **key, failed=reason)
        return None
    median = statistics.median(samples)
    told(found, key | {"interval_us": [1e6 * t for t in statistics.median_interval(samples)]}, median)
    return median


def told(found: Found, key: dict[str, Any], median: float) -> None:
    """Adds a row with its rates."""
    rates = {"tb_s": key.get("bytes", 0) / median / 1e12, "tflop_s": key.get("flops", 0) / median / 1e12}
    line = f"{title(key)} {1e6 * median:10.1f} us {rates['tb_s']:7.3f} TB/s {rates['tflop_s']:8.2f} TFLOP/s"
    found.add(line, **key, median_us=1e6 * median, **rates)


def sample(run: Run) -> list[float]:
    """Seconds of some runs; on a GPU of replays of a graph."""
    return take_turns({"run": captured(run) if ON_GPU else run}, seconds=SECONDS, least=ROUNDS)["run"]


def title(key: dict[str, Any]) -> str:
    """What a row is of."""
    return f"{key['op']:17s} {key.get('backend', ''):7s}{key['case'][:26]:27s}{key.get('direction', ''):8s}"


if __name__ == "__main__":
    sys.exit(ends(main))
