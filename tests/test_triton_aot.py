"""Every Triton kernel compiles for every target, with the specialisations of real launches, and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is needed to compile Triton kernels")

ROOT = Path(__file__).parent.parent
OPS = sorted(path.parent.name for path in ROOT.glob("zipformer_kernels/ops/*/triton.py"))
TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}


SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB of shared memory that a program may have."""


def printed_by(script: str, *arguments: str) -> list[dict]:
    """The JSON lines that a script of tests prints, in a process in which Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op):
    rows = printed_by("aot.py", op)
    for target in TARGETS:
        assert sum(row["target"] == target for row in rows) >= 2, f"{target}: neither forward nor backward was launched"
    assert [row for row in rows if row["target"] == "sm_90" and row["spills"] > 0] == []
    if op == "attention":
        assert {row["target"] for row in rows if row["kernel"] == "softmax_kernel"} == TARGETS  # a variant's


def test_products_fit_every_target():
    """On an H100 they have the instructions of a warpgroup, and two programs share a multiprocessor."""
    rows = printed_by("aot_products.py")
    for target, kibibytes in SHARED.items():
        own = [row for row in rows if row["target"] == target]
        names = {"activated_kernel", "activated_gradient_kernel", "added_kernel", "lowered_kernel"}
        assert {row["kernel"] for row in own} == names
        assert [row for row in own if row["spills"] > 0 or row["shared"] > kibibytes * 1024] == []
    on_h100 = [row for row in rows if row["target"] == "sm_90" and row["kernel"] != "lowered_kernel"]
    assert [row for row in on_h100 if not all(one.startswith("HGMMA.64x") for one in row["products"] or [""])] == []
    assert [row for row in on_h100 if row["programs"] < 2 and not row["odd"]] == []


def test_a_layer_of_preset_l_spills_nothing():
    rows = printed_by("triton_training.py", "kernels")
    kernels = {row["kernel"] for row in rows}
    assert {"weights_kernel", "score_gradient_kernel", "position_gradient_kernel", "sum_parts"} <= kernels
    assert [row for row in rows if row["spills"] > 0] == []


def test_training_compiles_nothing_after_its_first_step():
    first, *later = printed_by("triton_training.py", "forms")
    assert len(first["kernels"]) >= 12
    assert [step for step in later if step["kernels"]] == []
