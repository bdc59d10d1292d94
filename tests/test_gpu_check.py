"""benchmarks/gpu_check.sh as far as it goes without a GPU: help, wrong calls, and its account of parts that fail."""

import os
import subprocess
import sys

import pytest
import torch

from zipformer_kernels.bench.machine import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


@pytest.fixture
def check(tmp_path):
    def run(*arguments, python=sys.executable, **variables):
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **variables}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_help_names_every_part(check):
    result = check("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "[build] [test] [sanitize] [bench]" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests"], "'tests'"),
        (["--fast"], "'--fast'"),
        (["--out"], "--out wants a folder"),
        (["--wheels", "nowhere"], "no folder nowhere"),
    ],
)
def test_wrong_calls_are_told_in_one_line(check, tmp_path, arguments, message):
    result = check(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_python_without_torch_is_told(check, tmp_path):
    result = check(python=tmp_path / "no-python")
    assert result.returncode == 2
    assert "has no torch" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told(check, tmp_path):
    result = check()
    assert (result.returncode, result.stderr) == (2, "gpu_check: torch sees no CUDA device\n")
    assert not (tmp_path / "out").exists()


def test_the_table_comes_last_and_counts_what_failed(check, tmp_path):
    """With a Python that finds a GPU, passes tests and fails to measure."""
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  "-m pytest"*) echo "7 passed" ;;
  "-m zipformer_kernels.cli"*) echo "no luck"; exit 3 ;;
esac
"""
    )
    python.chmod(0o755)
    result = check("test", "bench", python=python)
    assert result.returncode == 1
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["test", "ok"], ["bench", "FAILED"]]
    assert result.stdout == (tmp_path / "out" / "summary.txt").read_text()
    assert "7 passed" in result.stdout
    assert "no luck" in result.stdout
    assert check("test", python=python).returncode == 0
