"""Runs every CUDA and Triton kernel on its op's small awkward cases, forward and backward: for compute-sanitizer."""

from __future__ import annotations

import importlib
import itertools
import sys

import torch

from benchmarks.harness.op_jobs import Passes
from zipformer_kernels import ops, use_backend
from zipformer_kernels.core import backend


def main() -> int:
    """Runs them on the backends named, ``cuda`` by default; prints a line for each op. 1 if nothing could run."""
    if not torch.cuda.is_available():
        print("torch sees no CUDA device", file=sys.stderr)
        return 1
    ran = 0
    for where, name in itertools.product(sys.argv[1:] or ["cuda"], ops.names()):
        operation = ops.get(name)
        if where not in operation.backends or backend.missing[where] is not None:
            continue
        cases = [case for case in importlib.import_module(f"{ops.__name__}.{name}.cases").CASES if not case.large]
        count = sum(run(operation, case, dtype, where) for case in cases for dtype in (torch.float32, torch.bfloat16))
        print(f"{name}: {count} runs on {where}", flush=True)
        ran += count
    torch.cuda.synchronize()
    return int(ran == 0)


def run(operation: object, case: object, dtype: torch.dtype, where: str) -> bool:
    """Runs a case in a dtype where the backend takes it; whether it does."""
    torch.manual_seed(0)
    args = case.inputs(dtype, "cuda")
    if operation.unsupported(where, *args) is not None:
        return False
    with use_backend(where):
        if hasattr(operation, "reference"):
            Passes(operation, args).results()
        else:
            operation(*args)
    return True


if __name__ == "__main__":
    sys.exit(main())
