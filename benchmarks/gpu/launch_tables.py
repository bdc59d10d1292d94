"""Tables of what an encoder layer launches, from the counts of benchmarks/launches.py, for docs/gpu.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.gpu.markdown import table

PEERS = ("upstream", "ours")
PASSES = ("forward", "backward")


def launch_tables(found: dict[str, Any]) -> list[str]:
    """How many launches a layer makes, and a list of them for each kind of work.

    Args:
        found: what benchmarks/results/launches.json holds.
    """
    parts = [
        "Of one encoder layer under one seed, by [benchmarks/launches.py](../benchmarks/launches.py): operations of "
        "PyTorch that launch something, kernels of Triton by module and name, and CUDA kernels behind the function of "
        "the compiled module that launches them. Views and allocations launch nothing, and are not counted.",
        summary(found["results"]),
    ]
    for work, row in found["results"].items():
        parts += [f"### {work[0].upper()}{work[1:]}", listed(row)]
    return parts


def summary(results: dict[str, Any]) -> str:
    """All launches of each kind of work, forward and backward apart."""
    columns = [f"{peer}, {one}" for peer in PEERS for one in (*PASSES, "both")]
    lines = []
    for work, row in results.items():
        sums = [[sum(row[peer][one].values()) for one in PASSES] for peer in PEERS]
        lines.append((work, *(shown(x) for forward, backward in sums for x in (forward, backward, forward + backward))))
    return table(["", *columns], lines)


def listed(row: dict[str, Any]) -> str:
    """A line for each name, those first that ours launches most often."""
    passes = [one for one in PASSES if any(row[peer][one] for peer in PEERS)]
    sums = {peer: sum((Counter(row[peer][one]) for one in passes), Counter()) for peer in PEERS}
    names = sorted(sums["ours"] | sums["upstream"], key=lambda x: (-sums["ours"][x], -sums["upstream"][x], x))
    lines = [
        (f"`{name}`", *(shown(row[peer][one].get(name, 0)) for peer in reversed(PEERS) for one in passes))
        for name in names
    ]
    return table(["launch", *(f"{peer}, {one}" for peer in reversed(PEERS) for one in passes)], lines)


def shown(count: int) -> str:
    """A number of launches; nothing for none."""
    return str(count) if count else ""
