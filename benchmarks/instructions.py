"""Predicts how long every kernel takes on an H100 and an H200, without a GPU, and writes docs/gpu.md.

``python benchmarks/instructions.py`` compiles the kernels for sm_90 as the model would launch them, reads their
instructions, and runs a simple model of the GPU over them. It takes some minutes. ``--page`` writes the page alone,
from the counts of the last run and from what was measured since (``benchmarks/results/<device>/gpu_check/table.json``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import page  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
COUNTS = RESULTS / "instructions.json"
PAGE = ROOT / "docs/gpu.md"


def count() -> dict[str, Any]:
    """The content of `COUNTS`: compiles, records and predicts, with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks.gpu import counts, layer, recording

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        work = [(peer, work) for work in counts.WORK for peer in ("ours", "upstream")]
        bar = progress.add_task(
            "CUDA kernels",
            total=2
            + sum(map(len, map(counts.cases_of, counts.OPS)))
            + len(layer.KINDS) * len(counts.STACKS)
            + len(work),
        )

        def step(name: str) -> None:
            progress.update(bar, advance=1, description=name)

        native = recording.load_module(recording.build_module())
        kernels = counts.Kernels()
        rows = list(counts.op_rows(native, kernels, step))
        layers = list(layer.rows(native, kernels, step))
        models = []
        for peer, kind in work:
            step(f"L, {peer}, {kind}")
            models.append(counts.model_row(native, kernels, peer, kind))
        step("done")
    return {"versions": versions(), "ops": rows, "layers": layers, "model": models}


def versions() -> str:
    """What compiled the kernels."""
    import torch
    import triton

    from benchmarks.gpu.recording import csrc_build

    nvcc = subprocess.run([csrc_build().nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    release = nvcc.split("release ")[1].split(",")[0]
    return f"torch {torch.__version__}, triton {triton.__version__}, nvcc {release}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page alone, from the counts of the last run")
    if not parser.parse_args().page:
        found = count()
        COUNTS.write_text(json.dumps(found, indent=1) + "\n")
    counts = json.loads(COUNTS.read_text())
    PAGE.write_text(page.rewritten(PAGE.read_text(), page.page(counts, RESULTS)))
    for model in counts["model"]:
        sums = " / ".join(f"{name} {sum(row.values()):.0f} ms" for name, row in model["predicted_ms"].items())
        print(f"L, {model['work']}, {model['peer']}: {sums}")


if __name__ == "__main__":
    main()
