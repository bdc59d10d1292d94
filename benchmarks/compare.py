"""Times the peers of ops side by side, in turns, and writes every sample.

``python benchmarks/compare.py [OP ...] [--dtype float32] [--case TEXT]`` prints a table for each op and writes
``benchmarks/results/<device>/<op>.json``: environment, copy rate, and for each case, direction and peer its samples.
"""

import argparse
import json
import statistics
from pathlib import Path

import harness
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

OPS = ("swoosh", "bias_norm", "swoosh_linear", "attention", "nonlin_attention")


def measure(op: str, dtype: torch.dtype, wanted: str, progress: Progress) -> list[dict]:
    """Rows of results for one op."""
    rows = []
    cases = [case for case in harness.cases_of(op) if wanted in case.name]
    task = progress.add_task(op, total=len(cases) * len(harness.DIRECTIONS))
    for case in cases:
        for direction in harness.DIRECTIONS:
            jobs = harness.jobs(op, case, dtype, direction)
            runs = {job.peer: job.run for job in jobs}
            if op == "swoosh" and direction == "forward":
                x = case.inputs(dtype, harness.DEVICE)[0].detach()
                runs["copy"] = x.clone
            samples = harness.interleaved(runs)
            medians = {name: statistics.median(times) for name, times in samples.items()}
            rows += [
                {
                    "op": op,
                    "case": case.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "direction": direction,
                    "peer": name,
                    "median_s": medians[name],
                    "spread_s": statistics.quantiles(times, n=4)[2] - statistics.quantiles(times, n=4)[0],
                    "bytes": jobs[0].moved,
                    "flops": jobs[0].flops,
                    "eager_over_this": medians["eager"] / medians[name],
                    "samples_s": times,
                }
                for name, times in samples.items()
            ]
            progress.advance(task)
    return rows


def show(op: str, rows: list[dict], copy: float, console: Console) -> None:
    """A table of one op's rows."""
    table = Table(title=f"{op}, {rows[0]['dtype']} (a copy moves {copy / 1e9:.0f} GB/s)")
    for column in ("case", "direction", "peer", "ms", "eager / this", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="left" if column in ("case", "direction", "peer") else "right")
    for row in rows:
        seconds = row["median_s"]
        table.add_row(
            *(row["case"], row["direction"], row["peer"], f"{seconds * 1e3:.3f}", f"{row['eager_over_this']:.2f}"),
            *(f"{row['bytes'] / seconds / 1e9:.1f}", f"{row['flops'] / seconds / 1e9:.1f}"),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", default=OPS, help=f"any of {', '.join(OPS)}; all of them if none is named")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, help="a folder; benchmarks/results/<device> by default")
    options = parser.parse_args()
    console = Console()
    folder = options.output or harness.RESULTS / harness.slug(harness.device_name())
    folder.mkdir(parents=True, exist_ok=True)
    copy = harness.copy_rate()
    for op in options.op:
        with Progress(console=console, transient=True) as progress:
            rows = measure(op, getattr(torch, options.dtype), options.case, progress)
        if not rows:
            console.print(f"{op}: no case fits this machine")
            continue
        show(op, rows, copy, console)
        content = {"environment": harness.environment(), "copy_bytes_per_s": copy, "rows": rows}
        suffix = "" if options.dtype == "float32" else f"-{options.dtype}"
        (folder / f"{op}{suffix}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
