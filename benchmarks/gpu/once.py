"""Runs each op once, forward and backward, on the longest sequences of preset L: what a profiler of kernels is to see.

``python once.py [OP ...]``. Everything is run before, so that what compiles is compiled; the profiler is started and
stopped around one pass: ``ncu --profile-from-start off``.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.table import ON_GPU, dtype_of, prepared, rows
from benchmarks.harness.machine import synchronize
from benchmarks.harness.peers import Unserved
from zipformer_kernels import ops


def main() -> None:
    """Prints what it runs."""
    seen = set()
    for row in rows(sys.argv[1:] or ops.names()):
        name, where, case = row["op"], row["backend"], row["case"]
        if (name, where) in seen or where == "eager":
            continue
        seen.add((name, where))
        try:
            *_, run = prepared(ops.get(name), where, case, dtype_of(name)).values()
        except Unserved:
            continue
        run()
        synchronize()
        print(f"{name} on {where}: {case.name}", flush=True)
        if ON_GPU:
            torch.cuda.cudart().cudaProfilerStart()
        run()
        synchronize()
        if ON_GPU:
            torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
