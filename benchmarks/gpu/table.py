"""Each kernel at preset L's four shapes, 30 x 30 s, in the model's dtype: microseconds, and the share of the copy rate.

``python table.py OUT.json [--seconds N] [OP ...]``. Ops run as CUDA graphs, so that no Python stands between kernels,
each run after the L2 cache was overwritten. ``both`` is forward and backward. Two rows come first that the others are
read against: a copy, and a product of large matrices. Without a GPU small cases are timed, to try the stage itself.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from found import Found, ends
from zipformer_kernels.bench.peers import attempt

from zipformer_kernels import backend, ops
from zipformer_kernels.bench import statistics
from zipformer_kernels.bench.machine import DEVICE
from zipformer_kernels.bench.op_jobs import Passes
from zipformer_kernels.bench.timing import captured, take_turns
from zipformer_kernels.ops.cases import Case

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16
BACKENDS = ("cuda", "triton", "eager") if ON_GPU else ("cpu", "eager")
DIRECTIONS = ("forward", "both")
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
    for row in rows(arguments.ops or [name for name in ops.names() if hasattr(ops.get(name), "reference")]):
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
            for case, where, direction in (
                (case, where, direction)
                for case in chosen[name][i : i + 1]
                for where in BACKENDS
                for direction in DIRECTIONS
            ):
                if where in ops.get(name).backends and backend.missing[where] is None:
                    yield {"op": name, "backend": where, "case": case, "direction": direction}


def is_timed(case: Case) -> bool:
    """Whether a case is one of preset L's; without a GPU, whether it is small."""
    return case.large and case.name.startswith("L ") if ON_GPU else not case.large


def add(found: Found, row: dict[str, Any]) -> None:
    """Times one op's case."""
    case, direction, operation = row["case"], row["direction"], ops.get(row["op"])
    sizes, flops = case.bytes(DTYPE.itemsize), case.flops
    moved = sizes["forward"] if direction == "forward" else sum(sizes.values())
    work = flops.get("forward", 0) if direction == "forward" else sum(flops.values())
    key = row | {"case": case.name, "dtype": str(DTYPE).removeprefix("torch."), "bytes": moved, "flops": work}

    torch.manual_seed(0)
    args, reason = attempt(case.inputs, DTYPE, DEVICE)
    reason = reason or operation.unsupported(row["backend"], *args)
    if reason is not None:
        found.add(f"{title(key)}: {reason}", **key, skipped=reason)
        return
    passes = Passes(partial(operation, backend=row["backend"]), args)
    _, reason = attempt(passes.results)
    if reason is not None:
        found.add(f"{title(key)}: {reason}", **key, failed=reason)
        return
    add_time(found, key, passes.run(direction))


def add_time(found: Found, key: dict[str, Any], run: Any) -> None:
    """Adds the row of a function that runs."""
    samples, reason = attempt(sample, run)
    if reason is not None:
        found.add(f"{title(key)}: {reason}", **key, failed=reason)
        return
    median = statistics.median(samples)
    key |= {"median_us": 1e6 * median, "interval_us": [1e6 * t for t in statistics.median_interval(samples)]}
    key |= {"tb_s": key.get("bytes", 0) / median / 1e12, "tflop_s": key.get("flops", 0) / median / 1e12}
    found.add(f"{title(key)} {key['median_us']:10.1f} us {key['tb_s']:7.3f} TB/s {key['tflop_s']:8.2f} TFLOP/s", **key)


def sample(run: Any) -> list[float]:
    """Seconds of some runs; on a GPU of replays of a graph."""
    return take_turns({"run": captured(run) if ON_GPU else run}, seconds=SECONDS, least=ROUNDS)["run"]


def title(key: dict[str, Any]) -> str:
    """What a row is of."""
    return f"{key['op']:17s} {key.get('backend', ''):7s}{key['case'][:26]:27s}{key.get('direction', ''):8s}"


if __name__ == "__main__":
    sys.exit(ends(main))
