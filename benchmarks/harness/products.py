"""How far a forward pass is from its own matrix products, and where the rest of its time goes."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import memory, models, peers, upstream
from benchmarks.harness.job import Job, Measured
from benchmarks.harness.machine import DEVICE, synchronize
from benchmarks.harness.peers import Prepared, Run, Unserved, attempt
from benchmarks.harness.statistics import median
from benchmarks.harness.timing import times
from zipformer_kernels.core import backend

BATCH, SECONDS = 4, 16
ALONE = "its products alone"


class Products(TorchDispatchMode):
    """Counts the shapes (rows, inner, columns) of the products with weights: addmm and mm."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, operation: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation._schema.name
        if name in ("aten::addmm", "aten::mm"):
            a, b = args[-2:]
            self.shapes[(a.shape[0], a.shape[1], b.shape[1])] += 1
        return operation(*args, **(kwargs or {}))


def products_of(name: str) -> Counter[tuple[int, int, int]]:
    """The products with weights in upstream's forward pass of a preset: what no implementation can do without."""
    found = Products()
    encoder = models.Encoder(models.encoder("upstream", name))
    run = models.inference(partial(models.frames, name, BATCH, SECONDS), torch.float32, encoder)
    with found:
        run()
    return found.shapes


class ProductsJob(Job):
    """The encoder beside nothing but its matrix products; its result also has the profile of ours."""

    def measured(self, rates: dict[str, Any], peers: Sequence[str]) -> Measured:
        found = super().measured(rates, peers)
        if any(row["peer"] == "ours" for row in found.rows):
            profile, reason = attempt(lambda: shares(self.case, self.prepare(("ours",)).runs["ours"]))
            found.profile = profile or []
            found.failed += self.reasons({"ours": f"its profile: {reason}"} if reason else {})
        return found


def jobs(every: bool = False) -> Iterator[Job]:
    """One for each preset."""
    for name in ("S", "M", "L"):
        yield ProductsJob(
            *("encoder-products", f"{name}, {BATCH} x {SECONDS} s", "forward", torch.float32),
            (ALONE, "ours", "upstream"),
            partial(_prepare, name),
            seconds=2.0,
            apart=True,
        )


def shares(case: str, run: Callable[[], Any], rounds: int = 5) -> list[dict[str, Any]]:
    """Where the time of a function goes: seconds a run in each torch operator and kernel of ours, the largest first.

    What no operator and no kernel claims is Python and dispatch, under the name ``between``. On a GPU kernels by name.
    """
    with memory.quiet(), named_kernels(), profile(activities=_activities()) as recorded:
        for _ in range(rounds):
            run()
        synchronize()
    on_gpu = DEVICE.type == "cuda"
    rows = [
        {
            "case": case,
            "name": event.key,
            "calls": event.count / rounds,
            "seconds": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / rounds,
        }
        for event in recorded.key_averages()
    ]
    between = median(times(run, rounds)) - sum(row["seconds"] for row in rows)
    rows.append({"case": case, "name": "between", "calls": 1.0, "seconds": max(between, 0.0)})
    return sorted((row for row in rows if row["seconds"] > 0), key=lambda row: -row["seconds"])


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [ProfilerActivity.CPU]


@contextmanager
def named_kernels() -> Iterator[None]:
    """Within the block the profiler sees each call into the compiled module by its name."""
    native = backend.native
    if native is None:
        yield
        return
    seen = types.SimpleNamespace(**vars(native))
    for name, function in vars(native).items():
        if name.endswith(("_cpu", "_cuda")):
            setattr(seen, name, partial(_named, name, function))
    backend.native = seen
    try:
        yield
    finally:
        backend.native = native


def _named(name: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    with record_function(name):
        return function(*args, **named)


def _prepare(name: str, wanted: Sequence[str]) -> Prepared:
    whole = [peer for peer in wanted if peer != ALONE]
    make_run = partial(models.inference, partial(models.frames, name, BATCH, SECONDS), torch.float32)
    probe = partial(models.evaluated, partial(models.frames, name, 2, 3))
    prepared = models.prepare(
        lambda peer: models.Encoder(models.encoder(peer, name)), make_run, probe, torch.float32, whole
    )
    if ALONE in wanted:
        alone = peers.prepare([ALONE], lambda _: _alone(name))
        prepared.runs |= alone.runs
        prepared.skipped |= alone.skipped
        prepared.failed |= alone.failed
    return prepared


def _alone(name: str) -> Run:
    reason = upstream.unavailable()
    if reason is not None:
        raise Unserved(reason)

    def operands(rows: int, inner: int, columns: int) -> tuple[Tensor, ...]:
        sizes = (columns,), (rows, inner), (columns, inner)
        return tuple(torch.randn(size, device=DEVICE) for size in sizes)

    made = [operands(*shape) for shape in products_of(name).elements()]

    def run() -> None:
        for bias, x, weight in made:
            torch.addmm(bias, x, weight.t())

    return run
