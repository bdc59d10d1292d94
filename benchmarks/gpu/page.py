"""Writes docs/gpu.md: tables of what is predicted, with a column for what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.launch_tables import launch_tables
from benchmarks.gpu.markdown import table
from benchmarks.gpu.roofline import MACHINES

BEGIN, END = "<!-- written by benchmarks/instructions.py -->", "<!-- end -->"
RESULTS = Path(__file__).parents[1] / "results"
BEFORE = RESULTS / "attention-before.json"
"""What was counted before attention was written anew."""
DIRECTIONS = ("forward", "backward", "step")


def rows_measured(results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The GPU, and a row of what was measured on it, as benchmarks/gpu/table.py writes them.

    Args:
        results: the folder benchmarks/results. It may hold no such file.
    """
    for path in sorted(results.glob("*/gpu_check/table.json")):
        device = path.parent.parent.name
        machine = next((m.name for m in MACHINES if m.name.lower() in device), device)
        for row in json.loads(path.read_text())["rows"]:
            if "backend" in row and "median_us" in row:  # else a ceiling, or one that failed
                yield machine, row


def measured(results: Path) -> dict[tuple[str, ...], dict[str, float]]:
    """Microseconds by op, backend, case and direction, and there by GPU."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for machine, row in rows_measured(results):
        key = row["op"], row["backend"], row["case"], row["direction"]
        found.setdefault(key, {})[machine] = row["median_us"]
    return found


def kernels_measured(results: Path) -> dict[tuple[str, ...], dict[str, list[dict[str, Any]]]]:
    """The profiler's kernels by op, backend and case, and there by GPU."""
    found: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for machine, row in rows_measured(results):
        if row.get("kernels"):
            found.setdefault((row["op"], row["backend"], row["case"]), {})[machine] = row["kernels"]
    return found


def of_kernel(name: str, profiled: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Microseconds of a launch by GPU, of the kernel that is called so behind its op's name, templates aside."""
    word = re.compile(rf"\b{name.split('.')[-1]}\b")
    found = {}
    for machine, kernels in profiled.items():
        those = [kernel for kernel in kernels if word.search(kernel["name"])]
        count = sum(kernel["count"] for kernel in those)
        if count:
            found[machine] = 1e3 * sum(kernel["ms"] for kernel in those) / count
    return found


def by_machine(times: dict[str, float]) -> str:
    """Measured microseconds, with the GPU's name."""
    return " / ".join(f"{name} {number(us)}" for name, us in sorted(times.items()))


def page(counts: dict[str, Any], results: Path) -> str:
    """The generated part of docs/gpu.md.

    Args:
        counts: what benchmarks/results/instructions.json holds.
        results: the folder with what was measured.
    """
    before = json.loads(BEFORE.read_text())["layers"]
    rows = sorted(counts["ops"], key=lambda row: (row["op"], row["case"], DIRECTIONS.index(row["direction"])))
    parts = [
        f"Written from [counts](../benchmarks/results/instructions.json) of {counts['versions']}.",
        "## The kernels furthest from their floor",
        furthest(counts["model"]),
        "## The encoder of preset L, 30 x 30 s",
        *model_tables(counts["model"]),
        "## Launches of a layer",
        *launch_tables(json.loads((RESULTS / "launches.json").read_text())),
        "## Attention of a layer",
        *layer_tables(counts["layers"], before),
        "## Each op",
        ops_table(rows, measured(results)),
        "## Each kernel",
        kernels_table(rows, kernels_measured(results)),
    ]
    return "\n\n".join(parts) + "\n"


def number(x: float) -> str:
    """Three digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def pair(values: dict[str, float]) -> str:
    """The numbers of both GPUs, or one where they agree."""
    shown = [number(values[m.name]) for m in MACHINES]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def furthest(models: list[dict[str, Any]]) -> str:
    """Kernels of a training step by how many milliseconds they lose to their floors."""
    kernels = next(m["kernels"] for m in models if m["peer"] == "ours" and m["work"] == "training")

    def lost(row: dict[str, Any]) -> float:
        return row["predicted_ms"]["H100"] - row["floor_ms"]["H100"]

    lines = [
        (
            f"`{row['kernel']}`",
            row["backend"],
            row["launches"],
            pair(row["predicted_ms"]),
            pair(row["floor_ms"]),
            f"{row['predicted_ms']['H100'] / row['floor_ms']['H100']:.1f}x",
            row["bound"]["H100"],
        )
        for row in sorted(kernels, key=lost, reverse=True)
        if lost(row) > 0.05
    ]
    text = "In a training step of L, ms of all launches, H100 / H200; the kernels that lose most first."
    head = "kernel, backend, launches, predicted, floor, of its floor on H100, bound"
    return f"{text}\n\n{table(head, lines)}"


def model_tables(models: list[dict[str, Any]]) -> list[str]:
    """Predicted milliseconds of inference and of a training step, ours and upstream's, by what they go to."""
    names = sorted({name for m in models for name in m["launches"]}, key=lambda name: (name[0].islower(), name))
    head = ["H100 / H200", *(f"{m['work']}: {m['peer']}" for m in models)]
    lines = [
        (name, *(pair({k: row.get(name, 0.0) for k, row in m["predicted_ms"].items()}) for m in models))
        for name in names
    ]
    sums = [{k: sum(row.values()) for k, row in m["predicted_ms"].items()} for m in models]
    lines.append(("**sum, ms**", *(f"**{pair(values)}**" for values in sums)))
    lines.append(("launches", *(sum(m["launches"].values()) for m in models)))
    lines.append(("of the shortest, 3 us", *(pair(m["shortest"]) for m in models)))
    lines.append(("GB moved", *(number(sum(m["bytes"].values()) / 1e9) for m in models)))
    lines.append(("TFLOP of products", *(number(m["flops"] / 1e12) for m in models)))
    return [
        "Predicted ms on the device; launches follow each other without gaps, as in a CUDA graph.",
        table(head, lines),
    ]


def layer_tables(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """Attention of a training layer: all kernels of its three uses, then each at the first stack."""
    before = [row | {"weights": "before"} for row in before]
    kinds = sorted({(row["backend"], row["weights"]) for row in now}, reverse=True)
    kinds.insert(0, ("triton", "before"))
    found = {(r["stack"], r["direction"], r["backend"], r["weights"]): r for r in (*before, *now)}
    lines, sums = [], {kind: {m.name: 0.0 for m in MACHINES} for kind in kinds}
    for stack, layers in zip(stacks_of(now), LAYERS, strict=True):
        for direction in ("forward", "backward"):
            rows = [found[(stack, direction, *kind)] for kind in kinds]
            lines.append(
                (
                    stack.removesuffix(", 30 x 30 s"),
                    direction,
                    *(number(row["instructions"]) for row in rows),
                    *(pair(row["predicted_us"]) for row in rows),
                )
            )
            for kind, row in zip(kinds, rows, strict=True):
                for m in MACHINES:
                    sums[kind][m.name] += layers * row["predicted_us"][m.name] / 1e3
    lines.append(("**all 19 layers, ms**", "both", *[""] * len(kinds), *(f"**{pair(sums[kind])}**" for kind in kinds)))
    names = [" ".join(kind) for kind in kinds]
    head = ["case", "direction", *(f"instructions, {name}" for name in names), *(f"us, {name}" for name in names)]
    text = (
        "NonlinAttention uses the first head, two self-attentions use all. Instructions are those of all kernels of "
        "attention, for each score of the layer; us include gates, and PyTorch's products and passes. *Stored* and "
        "*recomputed* say how attention weights are held; *before* is the commit that attention-before.json names."
    )
    return [f"{text}\n\n{table(head, lines)}", layer_kernels(now)]


def stacks_of(rows: list[dict[str, Any]]) -> list[str]:
    """The stacks that rows are of, in their order."""
    return list(dict.fromkeys(row["stack"] for row in rows))


LAYERS = (2, 4, 8, 5)
"""Layers of preset L by the shapes of its first four stacks, which the last two have again."""


def layer_kernels(rows: list[dict[str, Any]]) -> str:
    """Each kernel of a layer's attention at the first stack."""
    lines = [
        (
            f"`{one['kernel']}`",
            row["backend"],
            row["weights"],
            row["direction"],
            one["registers"],
            one["shared"],
            one["warps"],
            f"{number(one['instructions'])} a{'n' * (one['of'] == 'element')} {one['of']}",
            pair(one["predicted_us"]),
            one["bound"]["H100"],
        )
        for row in rows
        if row["stack"] == stacks_of(rows)[0]
        for one in row["kernels"]
    ]
    head = "kernel, backend, weights, direction, registers, shared, warps, instructions, us, bound"
    return f"At L's first stack, each launch; scores are those of the heads that it computes.\n\n{table(head, lines)}"


def ops_table(rows: list[dict[str, Any]], found: dict[tuple[str, ...], dict[str, float]]) -> str:
    """One line for each op, case, direction and backend."""
    lines = []
    for row in rows:
        key = row["op"], row["backend"], row["case"], row["direction"]
        times = found.get(key, {})
        lines.append(
            (
                row["op"],
                row["case"].removesuffix(", 30 x 30 s"),
                row["direction"],
                row["backend"],
                row["dtype"].replace("bfloat", "bf").replace("float", "f"),
                f"{row['bytes'] / 1e6:.0f}",
                overhead(row),
                f"{row['flops'] / 1e9:.1f}",
                len(row["kernels"]) + row["torch"],
                pair(row["floor_us"]),
                pair(row["predicted_us"]),
                by_machine(times),
            )
        )
    head = "op, case, direction, backend, dtype, MB, moved, GFLOP, launches, floor us, predicted us, measured us"
    about = (
        "Whole ops, PyTorch's launches inside them included; us on H100 / H200. *MB* must pass; *moved* is what all "
        "launches pass, over that, of ops without products. A tensor counts once a launch, however often it is read."
    )
    return f"{about}\n\n{table(head, lines)}"


def overhead(row: dict[str, Any]) -> str:
    """Bytes that launches pass over those that must, where nothing is multiplied beside them."""
    if row["op"] == "swoosh_linear" or row["op"] == "scaled_adam":
        return ""
    return f"{row['moved'] / row['bytes']:.2f}"


def kernels_table(rows: list[dict[str, Any]], profiled: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]]) -> str:
    """One line for each kernel of an op, case, direction and backend."""
    lines = []
    for row in rows:
        for one in row["kernels"]:
            bound = one["bound"]
            lines.append(
                (
                    f"`{one['kernel']}`",
                    f"{row['op']}, {row['case'].removesuffix(', 30 x 30 s')}",
                    one["backend"],
                    f"{one['blocks']} x {one['threads']}",
                    one["registers"],
                    one["spills"],
                    one["shared"],
                    one["warps"],
                    f"{one['bytes'] / 1e6:.0f}",
                    f"{one['matrix_flops'] / 1e9:.1f}" if one["matrix_flops"] else "",
                    f"{widths(one['accesses'], 'LD')} / {widths(one['accesses'], 'ST')}",
                    f"{number(one['instructions'])} a{'n' * (one['of'] == 'element')} {one['of']}",
                    pair(one["predicted_us"]),
                    bound["H100"] if bound["H100"] == bound["H200"] else f"{bound['H100']} / {bound['H200']}",
                    by_machine(of_kernel(one["kernel"], profiled.get((row["op"], row["backend"], row["case"]), {}))),
                )
            )
    head = (
        "kernel, case, backend, blocks x threads, registers, spills, shared, warps, MB, GFLOP, widths, instructions, "
        "us, bound, measured us"
    )
    text = (
        "Warps of a multiprocessor, 64 at most; spills and shared memory in bytes; widths: bytes that a thread loads / "
        "stores at a time, in global memory; GFLOP of matrix instructions, padding included; us on H100 / H200."
    )
    return f"{text}\n\n{table(head, lines)}"


def widths(accesses: dict[str, int], kind: str) -> str:
    """The bytes of a kernel's loads or stores, the most frequent first; those of less than a tenth are left out."""
    counts = {name.split()[1]: count for name, count in accesses.items() if name.startswith(kind)}
    most = max(counts.values(), default=0)
    return " ".join(sorted((w for w, count in counts.items() if 10 * count >= most), key=lambda w: -counts[w]))


def rewritten(text: str, generated: str) -> str:
    """A page with its generated part replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{generated}\n{END}{after}"
