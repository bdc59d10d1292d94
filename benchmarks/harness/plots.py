"""Plots of results, as PNG: how much faster than upstream, the roofline, and time and memory against length."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mode
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.ticker import NullLocator

Row = dict[str, Any]
OURS = ("ours", "cuda", "triton", "cpu")
OPTIONS = {"dpi": 100, "metadata": {"Software": None}}


def plot_all(results: Iterable[dict[str, Any]], folder: Path) -> list[Path]:
    """Every plot for which results of one device have rows; the files written."""
    results = list(results)
    rows = [row for result in results for row in result["rows"]]
    written = []
    for name, plot in (("speedup", speedup), ("roofline", roofline), ("length", length)):
        figure = plot(rows, results[0]["rates"]) if results else None
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png", **OPTIONS)
            pyplot.close(figure)
            written.append(folder / f"{name}.png")
    return written


def fastest_of_ours(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """For each job the fastest row of ours."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in ("benchmark", "case", "direction", "dtype"))
        if row["peer"] in OURS and (key not in best or row["median_s"] < best[key]["median_s"]):
            best[key] = row
    return best


def speedup(rows: list[Row], rates: dict[str, Any]) -> Any:
    """Bars: how many times longer upstream takes than the fastest of ours."""
    found = {key: row for key, row in fastest_of_ours(rows).items() if "upstream" in row["times_as_long"]}
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.3 * len(found)), layout="constrained")
    names = [", ".join(part for part in key if part != "float32") for key in found]
    bars = axes.barh(names, [row["times_as_long"]["upstream"] for row in found.values()])
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.margins(x=0.08, y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("upstream's time over ours")
    return figure


def roofline(rows: list[Row], rates: dict[str, Any]) -> Any:
    """The fastest of ours under the measured rates of copies and of matrix products, in the dtype of most rows."""
    found = [row for row in fastest_of_ours(rows).values() if row["bytes"] and row["flops"]]
    if not found:
        return None
    dtype = mode(row["dtype"] for row in found)
    found = [row for row in found if row["dtype"] == dtype]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for benchmark in dict.fromkeys(row["benchmark"] for row in found):
        own = [row for row in found if row["benchmark"] == benchmark]
        intensity = [row["flops"] / row["bytes"] for row in own]
        axes.scatter(intensity, [row["flops_per_s"] / 1e9 for row in own], label=benchmark)
    copy, matrix = rates["copy_bytes_per_s"] / 1e9, rates["matrix_flops_per_s"][dtype] / 1e9
    ends = sorted([0.5, matrix / copy, max(1000.0, 2 * matrix / copy)])
    axes.plot(ends, [min(matrix, copy * x) for x in ends], color="black")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    axes.legend()
    return figure


def length(rows: list[Row], rates: dict[str, Any]) -> Any:
    """Time and peak memory of one recording against its length, for each peer."""
    found = [row for row in rows if row["benchmark"] == "length"]
    if not found:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for peer in dict.fromkeys(row["peer"] for row in found):
        own = sorted((row for row in found if row["peer"] == peer), key=lambda row: row["minutes"])
        minutes = [row["minutes"] for row in own]
        left.plot(minutes, [row["median_s"] for row in own], marker="o", label=peer)
        right.plot(minutes, [row["peak_bytes"] / 1e9 for row in own], marker="o", label=peer)
    left.set(xscale="log", yscale="log", xlabel="minutes of audio", ylabel="seconds")
    right.set(xlabel="minutes of audio", ylabel="peak memory of the process, GB")
    right.set_ylim(bottom=0.0)
    minutes = sorted({row["minutes"] for row in found})
    left.set_xticks(minutes, [f"{x:g}" for x in minutes])
    left.xaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
