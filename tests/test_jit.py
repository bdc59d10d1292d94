"""core/jit.py: launches of Triton kernels without Triton's search for the compiled kernel."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is needed to compile Triton kernels")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def printed():
    """What jit_launches.py prints, in a process in which Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests/jit_launches.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "another Triton" in result.stderr:
        pytest.skip("Triton 3.4 to 3.6 would run this: others launch themselves")
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_call_gets_the_kernel_that_triton_chooses(printed):
    rows = [row for row in printed if "call" in row]
    assert len({row["triton"] for row in rows}) > 20, "the calls hardly differ"
    for row in rows:
        assert row["first"] == row["triton"], row["call"]
        assert row["second"] == row["triton"], row["call"]


def test_kernels_get_grids_and_arguments_as_given(printed):
    for row in printed:
        if "call" in row:
            assert row["grid"] == [3, 2, 1], row["call"]
            assert row["arguments"], row["call"]


def test_nothing_is_looked_up_twice(printed):
    rows = [row for row in printed if "call" in row]
    half = len(rows) // 2
    assert rows[half - 1]["forms"] == rows[-1]["forms"] <= half


def test_launches_go_to_the_current_device_and_stream(printed):
    found = [(row["device"], row["stream"], row["same"]) for row in printed if "device" in row]
    assert found == [(0, 7, True), (1, 0, True), (1, 8, True), (0, 0, True)]


def test_who_hooks_into_launches_sees_them(printed):
    assert {"hook": True, "afterwards": False} in printed
    assert {"replaced": True} in printed
    assert {"before": "before"} in printed


def test_wrong_arguments_raise_what_triton_raises(printed):
    errors = [row["wrong"] for row in printed if "wrong" in row]
    assert len(errors) == 3
    for ours, theirs in errors:
        assert ours == theirs


def launched(tree):
    """Names of what a module launches: ``name[grid](...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            kernel = node.func.value
            yield kernel.attr if isinstance(kernel, ast.Attribute) else getattr(kernel, "id", None)


def test_every_kernel_that_python_launches_is_launched_so():
    trees = {path: ast.parse(path.read_text()) for path in ROOT.glob("zipformer_kernels/**/*.py")}
    names = {name for tree in trees.values() for name in launched(tree)}
    slow = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in names
        for decorator in node.decorator_list
        if ast.unparse(decorator).startswith("triton.jit")
    ]
    assert not slow, "decorate them with zipformer_kernels.core.jit.jit"
