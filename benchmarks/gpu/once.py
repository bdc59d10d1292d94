"""Runs each op once, forward and backward, on the longest sequences of preset L: what a profiler of kernels is to see.

``python once.py [OP ...]``. Everything is run before, so that what compiles is compiled; the profiler is started and
stopped around one pass: ``ncu --profile-from-start off``.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from table import BACKENDS, DTYPE, ON_GPU, rows

from zipformer_kernels import ops
from zipformer_kernels.bench.machine import DEVICE, synchronize
from zipformer_kernels.bench.op_jobs import Passes


def main() -> None:
    """Prints what it runs."""
    named = sys.argv[1:] or [name for name in ops.names() if hasattr(ops.get(name), "reference")]
    seen = set()
    for row in rows(named):
        name, where, case = row["op"], row["backend"], row["case"]
        if (name, where) in seen or where not in [one for one in BACKENDS if one != "eager"]:
            continue
        seen.add((name, where))
        args = case.inputs(DTYPE, DEVICE)
        if ops.get(name).unsupported(where, *args) is not None:
            continue
        passes = Passes(partial(ops.get(name), backend=where), args)
        passes.results()
        synchronize()
        print(f"{name} on {where}: {case.name}", flush=True)
        if ON_GPU:
            torch.cuda.cudart().cudaProfilerStart()
        passes.both()
        synchronize()
        if ON_GPU:
            torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
