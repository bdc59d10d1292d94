"""Writes docs/results.md, and what README.md and docs/clients.md show of the committed results.

Every folder ``benchmarks/results/<device>/`` that holds results files appears by itself, with the plots that
``make bench`` left there. ``tests/test_report.py`` runs this again and compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import headlines  # noqa: E402
from benchmarks.harness import clients, results  # noqa: E402
from benchmarks.harness.plots import fastest_of_ours  # noqa: E402
from benchmarks.harness.tables import milliseconds  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- written by benchmarks/report.py -->", "<!-- end -->"
PLOTS = {"speedup": "Upstream's time over ours", "roofline": "Roofline", "length": "Time and memory against length"}


def devices() -> dict[Path, list[dict[str, Any]]]:
    """The results of each device, by folder."""
    folders = sorted(path for path in RESULTS.iterdir() if any(path.glob("*.json")))
    return {folder: [results.read(path) for path in sorted(folder.glob("*.json"))] for folder in folders}


def clients_table(found: dict[Path, list[dict[str, Any]]]) -> str:
    """For each device what its results say of recipes' own models, and of which commits they are."""
    parts = []
    for folder, files in found.items():
        for file in (file for file in files if file["benchmark"] == clients.BENCHMARK):
            commits = ", ".join(f"{name} @{commit}" for name, commit in file["commits"].items())
            parts += [f"{commits}. {source(folder, file)}", clients.table(file["clients"], file["rows"])]
    return "\n\n".join(parts)


def machine_of(environment: dict[str, Any]) -> str:
    """The device, with the settings of the allocator, if there were any."""
    settings = environment.get("allocator", {}).items()
    return ", ".join([environment["device"], *(f"`{name}={value}`" for name, value in settings)])


def page(found: dict[Path, list[dict[str, Any]]]) -> str:
    """docs/results.md."""
    parts = ["# Results", "Written by `benchmarks/report.py` from the files it names; how they are measured stands in"]
    parts[-1] += " [benchmarks.md](benchmarks.md)."
    for folder, files in found.items():
        parts.append(f"## {machine_of(files[0]['environment'])}")
        parts += [
            f"![{title}](../benchmarks/results/{folder.name}/{name}.png)"
            for name, title in PLOTS.items()
            if (folder / f"{name}.png").exists()
        ]
        for file in files:
            parts += [f"### {file['benchmark']}", source(folder, file), rows_table(file["rows"])]
            if "profile" in file:
                parts += ["Where the time of ours goes:", profile_table(file["profile"])]
    return "\n\n".join(parts) + "\n"


def source(folder: Path, file: dict[str, Any]) -> str:
    """The file, and what it was measured on."""
    environment, rates = file["environment"], file["rates"]
    load = environment["load_average"]
    matrix = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates["matrix_flops_per_s"].items())
    return (
        f"[{file['benchmark']}.json](../benchmarks/results/{folder.name}/{file['benchmark']}.json): "
        f"torch {environment['versions']['torch']}, commit {(environment['commit'] or 'unknown')[:10]}"
        f"{' with changes' if environment['dirty'] else ''}, {environment['date'][:10]}"
        f"{f', load {load[0]:.1f}' if load else ''}; "
        f"copies {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s, products {matrix}."
    )


def rows_table(rows: list[dict[str, Any]]) -> str:
    """All rows of a benchmark; the last column is how many times longer than the fastest of ours."""
    lines = ["| case | direction | peer | ms | 95% | of copy | of matrix | peak MB | over ours |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    best = fastest_of_ours(rows)
    for row in rows:
        mine = best.get((row["benchmark"], row["case"], row["direction"], row["dtype"]))
        over = None if mine is None or mine is row else mine["times_as_long"].get(row["peer"])
        shares = [f"{row[name]:.0%}" if row[name] else "" for name in ("of_copy", "of_matrix")]
        cells = [milliseconds(row["median_s"]), milliseconds(row["p95_s"]), *shares, f"{row['peak_bytes'] / 1e6:.0f}"]
        cells.append(f"{over:.2f}" if over else "")
        lines.append(f"| {row['case']} | {row['direction']} | {row['peer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def profile_table(profile: list[dict[str, Any]], shown: int = 10) -> str:
    """The largest parts of each case, and their share."""
    lines = ["| case | part | calls | ms | share |", "|---|---|---|---|---|"]
    for case in dict.fromkeys(part["case"] for part in profile):
        parts = [part for part in profile if part["case"] == case]
        whole = sum(part["seconds"] for part in parts)
        rest = sum(part["seconds"] for part in parts[shown:])
        for part in (*parts[:shown], {"name": "everything else", "calls": 0, "seconds": rest}):
            calls = f"{part['calls']:.0f}" if part["calls"] else ""
            share = f"{part['seconds'] / whole:.0%}"
            lines.append(f"| {case} | `{part['name']}` | {calls} | {milliseconds(part['seconds'])} | {share} |")
    return "\n".join(lines)


def rewritten(page: str, *parts: str) -> str:
    """A page with each part between its marks, in this order."""
    texts = iter(parts)
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{next(texts)}\n{END}", page, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """What this script writes, by file."""
    found = devices()
    readme = ROOT / "README.md"
    of_clients = ROOT / "docs" / "clients.md"
    return {
        ROOT / "docs" / "results.md": page(found),
        readme: rewritten(readme.read_text(), headlines.numbers(), headlines.table()),
        of_clients: rewritten(of_clients.read_text(), clients_table(found)),
    }


if __name__ == "__main__":
    headlines.draw()
    for path, text in pages().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
