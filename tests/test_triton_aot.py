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


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "aot.py"), op]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for target in TARGETS:
        assert sum(row["target"] == target for row in rows) >= 2, f"{target}: neither forward nor backward was launched"
    assert [row for row in rows if row["target"] == "sm_90" and row["spills"] > 0] == []
