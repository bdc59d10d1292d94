"""Numbers in the documentation are those of the committed results."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_launch_counts_are_those_measured():
    results = json.loads((ROOT / "benchmarks/results/launches.json").read_text())["results"]
    text = (ROOT / "docs/kernels.md").read_text()
    for name, row in results.items():
        line = re.search(rf"\| {re.escape(name)} \| (\d+) \| (\d+) \| (\d+) \|", text)
        assert line, f"docs/kernels.md has no line for {name}"
        peers = "upstream", "ours", "ours, Triton"
        assert line.groups() == tuple(str(row[peer]["launches"]) for peer in peers)


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
