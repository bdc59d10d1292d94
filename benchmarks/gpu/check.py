"""Every kernel on its op's cases, forward and backward, in every dtype, against backend eager in float64.

``python check.py OUT.json [BACKEND ...]``, by default triton and cuda, on a machine without a GPU cpu. Each op, backend
and dtype has a process of its own, as many at once as there are cores: so Triton compiles on all of them, and a kernel
that breaks CUDA or kills its process is one line. A line has the largest error as a multiple of what rounding explains:

    error of a result = |result - exact| / |exact|,   allowed = 4 eps + 4 eps32 sqrt(n)

in the Euclidean norm, with eps of the dtype, eps32 of float32, in which all sums are taken, and n elements of the
output for each of the result. A gradient that vanishes but for rounding is measured against all gradients together.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.found import Found, ends
from benchmarks.gpu.stages import cores
from benchmarks.harness import optimizer
from benchmarks.harness.job import off_by
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.op_jobs import Passes
from benchmarks.harness.peers import told
from zipformer_kernels import ops
from zipformer_kernels.core import backend
from zipformer_kernels.ops import attention
from zipformer_kernels.ops.cases import Case

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
ROUNDINGS = 4  # in a row, of one element: an input's product, a weight, a sum, the result
SMALL = 0.01  # a gradient smaller than this share of all is what is left of larger terms, and rounds as they do
SOFTMAX = {"attention": 5, "nonlin_attention": 7}  # which argument the softmax's numbers are, each backend's own
LIMIT = 75  # seconds of one process


def cases_of(name: str, dtype: torch.dtype) -> list[Case]:
    """The small cases, awkward ones among them; on a GPU also preset L's own, in the dtype that it runs in."""
    cases = importlib.import_module(f"{ops.__name__}.{name}.cases").CASES
    real = DEVICE.type == "cuda" and dtype == torch.bfloat16
    return [case for case in cases if not case.large or (real and case.name.startswith("L "))]


def wide(value: Any) -> Any:
    """An argument in float64."""
    if isinstance(value, Tensor):
        moved = value.detach()
        return moved.double().requires_grad_(value.requires_grad) if moved.is_floating_point() else moved
    return torch.float64 if isinstance(value, torch.dtype) else value


def with_softmax(name: str, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """The arguments, with the softmax's numbers as the backend computes them."""
    i = SOFTMAX.get(name)
    if i is None:
        return args
    scores = (x if x is None else x.detach() for x in args[:4])
    return *args[:i], attention._op.variants["softmax"](*scores, *args[i + 1 : i + 5], backend=where), *args[i + 1 :]


def excess(results: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The largest error of an output and its gradients, as a multiple of what is allowed."""
    whole = torch.stack([x.norm() for x in exact[1:]]).norm()
    worst = 0.0
    for actual, wanted in zip(results, exact, strict=True):
        vanishes = wanted.norm() < torch.finfo(dtype).eps * whole
        size = whole if vanishes else torch.maximum(wanted.norm(), SMALL * whole)
        sums = math.sqrt(max(1.0, exact[0].numel() / wanted.numel()))
        allowed = ROUNDINGS * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * sums)
        error = ((actual.double() - wanted).norm() / size).item() / allowed
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def errors(name: str, where: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """For each case that the backend takes, its name and `excess`."""
    operation = ops.get(name)
    if name == "scaled_adam":
        yield steps_apart(where)
        return
    for case in cases_of(name, dtype):
        torch.manual_seed(0)
        args = case.inputs(dtype, DEVICE)
        if operation.unsupported(where, *args) is not None:
            continue
        if any(isinstance(x, Tensor) and x.numel() == 0 for x in args):
            continue  # no norm to measure against; the tests have it
        got, exact = (
            Passes(partial(operation, backend=runs_on), with_softmax(name, inputs, runs_on)).results()
            for runs_on, inputs in ((where, args), ("eager", tuple(map(wide, args))))
        )
        yield case.name, excess(got, exact, dtype)


def steps_apart(where: str) -> tuple[str, float]:
    """How far the first steps over all parameters of preset S part from the reference's, of what is allowed."""
    moved = []
    for runs_on in (where, "eager"):
        parameters = optimizer.parameters("S")
        moved.append(optimizer.movement(parameters, optimizer.step(runs_on, parameters)))
    return "the parameters of S", off_by(*moved) / optimizer.CHECKED_TO


def check(name: str, where: str, dtype: str) -> dict[str, Any]:
    """One op on one backend in one dtype: the row that says how it went."""
    row: dict[str, Any] = {"op": name, "backend": where, "dtype": dtype, "cases": 0, "worst": 0.0, "at": "", "ok": True}
    began = time.perf_counter()
    try:
        for case, error in errors(name, where, DTYPES[dtype]):
            row["cases"] += 1
            if error > row["worst"]:
                row["worst"], row["at"] = error, case
    except Exception as error:  # whatever a kernel raises is what is to be told
        row |= {"at": f"after {row['cases']} cases: {told(error)}", "ok": False}
    row["ok"] = row["ok"] and row["worst"] <= 1
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def in_a_process(name: str, where: str, dtype: str) -> dict[str, Any]:
    """`check` in a process of its own; if that ends before its time, a row that says how."""
    row = {"op": name, "backend": where, "dtype": dtype, "cases": 0, "worst": math.inf, "ok": False, "seconds": 0.0}
    command = [sys.executable, __file__, "--one", name, where, dtype]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return row | {"at": f"not done after {LIMIT} s"}
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    last = (result.stderr.splitlines() or ["no message"])[-1]
    return row | {"at": f"the process ended with {result.returncode}: {last[:150]}"}


@contextmanager
def at_once(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[list[Future]]:
    """Many calls, as many at a time as there are cores; an exception within the block begins no more of them."""
    pool = ThreadPoolExecutor(cores())
    try:
        yield [pool.submit(function, *one) for one in calls]
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> int:
    """Checks all ops; 1 if one is wrong or nothing ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=Path("check.json"))
    parser.add_argument("backends", nargs="*", default=["triton", "cuda"] if DEVICE.type == "cuda" else ["cpu"])
    parser.add_argument("--one", nargs=3, metavar=("OP", "BACKEND", "DTYPE"), help="this one, here; prints its row")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(check(*arguments.one)))
        return 0
    found = Found(arguments.output, "check")
    wanted = [
        (name, where, dtype)
        for dtype in DTYPES
        for name in ops.names()
        for where in arguments.backends
        if where in ops.get(name).backends and (name != "scaled_adam" or dtype == "float32")
    ]
    missing = {where: backend.missing[where] for where in arguments.backends if backend.missing[where]}
    for where, reason in missing.items():
        found.add(f"BAD  all ops             {where:7s} {reason}", backend=where, ok=False, at=reason)
    wanted.sort(key=lambda one: one[0] not in SOFTMAX)  # those that compile longest begin first
    with at_once(in_a_process, [one for one in wanted if one[1] not in missing]) as tasks:
        for task in as_completed(tasks):
            row = task.result()
            found.add(
                f"{'ok ' if row['ok'] else 'BAD'}  {row['op']:18s} {row['backend']:7s} {row['dtype']:9s} "
                f"{row['cases']:3d} cases, worst {row['worst']:.2f} of allowed ({row['at']}) {row['seconds']} s",
                **row,
            )
    return int(not found.rows or any(not row["ok"] for row in found.rows))


if __name__ == "__main__":
    sys.exit(ends(main))
