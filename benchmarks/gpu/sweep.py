"""Tries other tiles for attention's Triton kernels, on the longest sequences of preset L, and names the best.

``python sweep.py OUT.json [--seconds N] [KERNEL ...]``. A kernel's tile is changed while the others keep theirs; a pass
that uses the kernel is timed as a CUDA graph, and its results are compared with those before. What is faster stays
while the next kernel is tried. Nothing is changed in the sources: the last lines are what to write into core/tuned.py.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.found import Found, ends
from benchmarks.gpu.table import DTYPE, sample
from benchmarks.harness import statistics
from benchmarks.harness.job import off_by
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.op_jobs import Passes
from benchmarks.harness.peers import attempt
from zipformer_kernels import ops
from zipformer_kernels.core import tuning
from zipformer_kernels.ops import attention
from zipformer_kernels.ops.attention.tiles import TILES, Tile, tile_of

KERNELS = ("score", "value", "wide_aggregate", "aggregate", "position", "key", "softmax")
"""Those that take longest first."""
WIDE = ("value", "wide_aggregate")  # they serve wide values, such as NonlinAttention's
ROWS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2)
LARGEST = 64 * 64  # scores of a tile: beyond that registers do not hold them, and compiling takes half a minute


def tiles(now: Tile) -> Iterator[Tile]:
    """What to try in place of a tile, the nearest to it first."""
    found = [
        now._replace(targets=targets, sources=sources, warps=warps, stages=stages)
        for (targets, sources), warps, stages in itertools.product(itertools.product(ROWS, ROWS), WARPS, STAGES)
        if targets * sources <= LARGEST
    ]
    others = [tile for tile in found if tile != now]
    yield from sorted(others, key=lambda tile: sum(a != b for a, b in zip(tile, now, strict=True)))


def work(kernel: str) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
    """A function that launches the kernel, and one that gives results which depend on it."""
    name = "nonlin_attention" if kernel in WIDE else "attention"
    cases = importlib.import_module(f"{ops.__name__}.{name}.cases").CASES
    torch.manual_seed(0)
    args = next(case for case in cases if case.large and case.name.startswith("L ")).inputs(DTYPE, DEVICE)
    if kernel == "softmax":
        scores = *(x.detach() for x in args[:4]), *args[6:10]
        run = partial(attention._op.variants["softmax"], *scores, backend="triton")
        return run, lambda: [run()]
    passes = Passes(partial(ops.get(name), backend="triton"), args)
    return passes.forward if kernel.endswith("aggregate") else passes.both, passes.results


def timed(run: Callable[[], Any], results: Callable[[], list[Tensor]], expected: list[Tensor]) -> dict[str, Any]:
    """Microseconds of the function, and how far the results are off."""
    error = max(off_by(actual, wanted) for actual, wanted in zip(results(), expected, strict=True))
    return {"us": 1e6 * statistics.median(sample(run)), "off": error}


def entry_of(kernel: str) -> str:
    """The name of a tile's entry in `tuning`."""
    return TILES[kernel, DTYPE.itemsize].name


def sweep(found: Found, kernel: str, end: float) -> Tile:
    """The best of one kernel's tiles that were tried until the time was up."""
    (run, results), best = work(kernel), tile_of(kernel, DTYPE)
    expected = results()
    least = timed(run, results, expected)["us"]
    found.add(f"{kernel:10s} {short(best)} {least:9.1f} us, as it is", kernel=kernel, tile=best._asdict(), us=least)
    for tile in tiles(best):
        if time.monotonic() > end:
            break
        with tuning.override(**{entry_of(kernel): tile}):
            row, reason = attempt(timed, run, results, expected)
        row = {"failed": reason} if reason else row
        text = reason or f"{row['us']:9.1f} us, {row['us'] / least:.2f} of the best, off by {row['off']:.1e}"
        found.add(f"{kernel:10s} {short(tile)} {text}", kernel=kernel, tile=tile._asdict(), **row)
        if not reason and row["us"] < least and row["off"] < 0.05:
            best, least = tile, row["us"]
    return best


def short(tile: Tile) -> str:
    """A tile in a few characters."""
    return f"{tile.targets:3d} x {tile.sources:3d}, {tile.warps} warps, {tile.stages} stages"


def main() -> int:
    """Sweeps the kernels in turn, each for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("kernels", nargs="*", help=f"any of {', '.join(KERNELS)}; all by default")
    parser.add_argument("--seconds", type=float, default=85.0, help="for all of them")
    arguments = parser.parse_args()
    if DEVICE.type != "cuda":
        print("a GPU is needed: nothing else says how fast a tile is")
        return 1
    found, kernels = Found(arguments.output, "sweep"), arguments.kernels or KERNELS
    began, share = time.monotonic(), arguments.seconds / len(kernels)
    best: dict[str, Tile] = {}
    for i, kernel in enumerate(kernels):
        with tuning.override(**{entry_of(name): tile for name, tile in best.items()}):
            best[kernel] = sweep(found, kernel, began + share * (i + 1))
    for kernel, tile in best.items():
        print(f'    "{kernel}": {tuple(tile)},  # {DTYPE.itemsize} bytes')
    return 0


if __name__ == "__main__":
    sys.exit(ends(main))
