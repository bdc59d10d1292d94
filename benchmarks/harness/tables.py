"""Results as tables of text, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.harness.compare import Change
from benchmarks.harness.job import Job, Measured

COLUMNS = ("ms", "95%", "± ms", "GB/s", "of copy", "GFLOP/s", "of matrix", "peak MB", "launches", "x")
"""The last is how many times faster than the slowest."""


def milliseconds(seconds: float) -> str:
    """Three digits or all before the point."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def job_table(job: Job, found: Measured) -> Table:
    """What one job gave: a line for each peer."""
    table = Table(title=Text(job.title), title_justify="left")
    table.add_column("peer", no_wrap=True)
    slowest = max((row["median_s"] for row in found.rows), default=0.0)
    cells = [(*row_cells(row), f"{slowest / row['median_s']:.2f}") for row in found.rows]
    shown = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells)]
    for i in shown:
        table.add_column(COLUMNS[i], justify="right", no_wrap=True)
    for row, line in zip(found.rows, cells, strict=True):
        table.add_row(Text(row["peer"]), *(line[i] for i in shown))
    timed = {row["peer"] for row in found.rows}
    absent = (row["peer"] for row in (*found.wrong, *found.failed, *found.skipped))
    missing = ", ".join(dict.fromkeys(peer for peer in absent if peer not in timed))
    table.caption = f"not: {missing}" if missing else None
    return table


def row_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's numbers as text, empty where there is none."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return (
        milliseconds(row["median_s"]),
        milliseconds(row["p95_s"]),
        milliseconds(row["spread_s"]),
        cell(row["bytes_per_s"] and row["bytes_per_s"] / 1e9, "{:.1f}"),
        cell(row["of_copy"], "{:.0%}"),
        cell(row["flops_per_s"] and row["flops_per_s"] / 1e9, "{:.1f}"),
        cell(row["of_matrix"], "{:.0%}"),
        cell(row["peak_bytes"] and row["peak_bytes"] / 1e6, "{:.0f}"),
        cell(row["launches"], "{}"),
    )


def changes_table(changes: Sequence[Change]) -> Table:
    """Rows that differ beyond noise, and rows in one set only."""
    table = Table("benchmark", "case", "direction", "peer", "verdict")
    table.add_column("second / first", justify="right")
    for change in changes:
        if change.verdict != "noise":
            benchmark, case, direction, _, peer = map(Text, change.key)
            ratio = "" if change.ratio is None else f"{change.ratio:.2f}"
            style = {"regression": "bold red", "improvement": "green"}.get(change.verdict, "dim")
            table.add_row(benchmark, case, direction, peer, Text(change.verdict, style=style), ratio)
    return table
