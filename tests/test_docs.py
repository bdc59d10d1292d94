"""Numbers in the documentation are those of the committed results."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_launch_counts_are_those_measured():
    results = json.loads((ROOT / "benchmarks/results/launches.json").read_text())["results"]
    text = (ROOT / "docs/kernels.md").read_text()
    for name, row in results.items():
        line = re.search(rf"\| {re.escape(name)} \| (\d+) \| (\d+) \|", text)
        assert line, f"docs/kernels.md has no line for {name}"
        assert line.groups() == (str(row["upstream"]["launches"]), str(row["ours"]["launches"]))


def test_cpu_ratios_are_those_measured():
    text = (ROOT / "docs/kernels.md").read_text()
    lines = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| (forward|both) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE
    )
    assert lines
    for op, case, direction, *printed in lines:
        rows = json.loads((ROOT / f"benchmarks/results/amd-epyc-2-threads/{op}.json").read_text())["rows"]
        median = {row["peer"]: row["median_s"] for row in rows if (row["case"], row["direction"]) == (case, direction)}
        cpu = median["cpu"]
        measured = [f"{cpu * 1e3:.2f}", f"{median['eager'] / cpu:.1f}", f"{median['compiled'] / cpu:.1f}"]
        assert printed == measured, (op, case, direction)


def test_every_op_stands_in_the_table_with_the_backends_it_has():
    from zipformer_kernels import ops

    text = (ROOT / "docs/kernels.md").read_text()
    for name in ops.names():
        cells = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)[1].split("|")
        offered = {
            backend
            for backend, cell in zip(("eager", "cpu", "triton", "cuda"), cells, strict=False)
            if "F B" in cell or "step" in cell
        }
        assert offered | {"triton"} == set(ops.get(name).backends) | {"triton"}, name
