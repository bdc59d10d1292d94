"""benchmarks/gpu_check.sh as far as it goes without a GPU: its calls, its files whatever happens, its stages' code."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch

from benchmarks.harness.machine import ROOT
from zipformer_kernels.ops import swoosh

SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
STAGES = ROOT / "benchmarks" / "gpu"
DIRECTIONS = ("forward", "both", "backward")


def environment(*path, **variables):
    joined = os.pathsep.join(map(str, (*path, ROOT, ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": joined, "PYTHONUNBUFFERED": "1", **variables}


@pytest.fixture
def check(tmp_path):
    def run(*arguments, python=sys.executable, **variables):
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        variables = environment(PYTHON=str(python), OUT=str(tmp_path / "out"), **variables)
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)

    return run


# ---- calls ----


def test_help_names_every_stage_and_group(check):
    from benchmarks.gpu import stages

    result = check("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert all(name in result.stdout for name in (*stages.STAGES, *stages.GROUPS))
    seconds = [stages.STAGES[name].seconds for name in stages.GROUPS["quick"] if name != "build"]
    assert sum(seconds) < 1.5 * stages.QUICK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test"], "wanted any of quick, sanitize, all, build, check, "),
        (["--fast"], "--fast"),
        (["--out"], "--out"),
        (["--limit", "soon"], "--limit"),
        (["--prepared", "nowhere"], "--prepared: no folder nowhere"),
    ],
)
def test_wrong_calls_are_told_in_one_line(check, tmp_path, arguments, message):
    result = check(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU would run this")
def test_a_machine_without_a_gpu_is_told_in_the_files_too(check, tmp_path):
    result = check("quick")
    assert result.returncode == 2
    assert result.stderr.startswith("gpu_check: torch sees no CUDA device")
    assert "torch sees no CUDA device" in (tmp_path / "out/summary.txt").read_text()
    assert "check      not reached" in read_archive(tmp_path / "out", "summary.txt")


def test_an_output_that_cannot_be_made_is_told(check, tmp_path):
    (tmp_path / "file").write_text("")
    result = check("--out", tmp_path / "file", "quick")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert str(tmp_path / "file") in result.stderr


# ---- whatever happens, the files are there and say so ----

# A run of stages like the real ones: what each does is its program.
TOY = """
import sys
from benchmarks.gpu import run, stages
toys = [stages.Stage(name, seconds, (sys.executable, "-c", program), 9) for name, seconds, program in {toys!r}]
run.expand = lambda names: toys
run.device = lambda rehearse: "a toy"
sys.argv = ["run.py", "--limit", "60"]
sys.exit(run.main())
"""


@pytest.fixture
def toy(tmp_path):
    """Starts a run of toy stages, (name, seconds, program)."""

    def start(*toys):
        program = TOY.format(toys=toys)
        variables = environment(OUT=str(tmp_path / "out"))
        return subprocess.Popen(
            [sys.executable, "-c", program], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def read_archive(out, name):
    with tarfile.open(out / "results.tgz") as archive:
        return archive.extractfile(name).read().decode()


def states(out):
    """Stage and state of each row of the summary."""
    lines = (out / "summary.txt").read_text().splitlines()
    return [line[:33].strip().split(None, 1) for line in lines[2 : lines.index("", 2)]]


GOOD = ("good", 30, "print('one'); print('two')")
BUILD = ("build", 30, "import sys; print('error: no such type'); sys.exit(1)")
DIES = ("dies", 30, "import os; print('first', flush=True); os.kill(os.getpid(), 9)")
SLOW = (
    "slow",
    6,
    "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far: 3')",
)
STUBBORN = (
    "stubborn",
    5,
    "import signal, time; signal.signal(2, 1); print('deaf'); time.sleep(60)",
)
HANGS = ("hangs", 60, "import time; print('known', flush=True); time.sleep(60)")


def test_a_stage_that_fails_is_told_and_the_others_run(toy, tmp_path):
    process = toy(BUILD, DIES, GOOD, ("none", 9, "print('never')"))
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (1, "")
    out = tmp_path / "out"
    assert states(out)[:3] == [["build", "FAILED: code 1"], ["dies", "FAILED: code -9"], ["good", "ok"]]
    assert output == (out / "summary.txt").read_text()
    for text in ("error: no such type", "first", "one\ntwo"):
        assert text in output
    assert read_archive(out, "good.log") == "one\ntwo\n"
    assert read_archive(out, "build.log") == "error: no such type\n"


def test_a_stage_that_takes_too_long_is_asked_first(toy, tmp_path):
    process = toy(SLOW, STUBBORN, GOOD)
    process.communicate(timeout=100)
    assert process.returncode == 1
    assert states(tmp_path / "out") == [
        ["slow", "FAILED: over 6 s"],
        ["stubborn", "FAILED: over 5 s"],
        ["good", "ok"],
    ]
    summary = (tmp_path / "out/summary.txt").read_text()
    assert "so far: 3" in summary
    assert "deaf" in summary


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_is_cut_off_has_told_what_it_knew(toy, tmp_path, number):
    process, out = toy(GOOD, HANGS, ("after", 30, "print('never')")), tmp_path / "out"
    deadline = time.monotonic() + 60
    while not ((out / "summary.txt").exists() and "known" in (out / "summary.txt").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 130)
    assert states(out) == [["good", "ok"], ["hangs", "runs" if killed else "interrupted"], ["after", "not reached"]]
    assert "known" in (out / "summary.txt").read_text()
    assert read_archive(out, "good.log") == "one\ntwo\n"
    assert "good       ok" in read_archive(out, "summary.txt")


def test_a_stage_that_cannot_begin_is_told(tmp_path):
    from benchmarks.gpu import run, stages

    one = run.Run([stages.Stage("tool", 9, ("no-such-program",))], tmp_path / "other", 60, "")
    assert not one.perform({}, {})
    assert one.states == {"tool": "FAILED: no no-such-program"}
    late = run.Run([stages.STAGES["check"]], tmp_path / "late", 1, "")
    assert not late.perform({}, {})
    assert late.states == {"check": "no time was left"}


# ---- the stages' own code, on the CPU ----


def broken(monkeypatch, forward):
    """The row of swoosh on the CPU, with another forward kernel."""
    from benchmarks.gpu.check import check

    launchers = swoosh._op.backends["cpu"]
    monkeypatch.setitem(swoosh._op.backends, "cpu", dataclasses.replace(launchers, forward=forward))
    return check("swoosh", "cpu", "bfloat16")


def test_a_right_kernel_passes_the_check(monkeypatch):
    row = broken(monkeypatch, swoosh._op.backends["cpu"].forward)
    assert row["ok"], row["at"]
    assert row["cases"] >= 2
    assert 0 < row["worst"] < 1


def test_a_wrong_kernel_fails_the_check(monkeypatch):
    right = swoosh._op.backends["cpu"].forward
    assert not broken(monkeypatch, lambda *args: (right(*args)[0] * 1.05,))["ok"]
    assert broken(monkeypatch, lambda *args: (right(*args)[0] * math.nan,))["worst"] == math.inf


def test_a_kernel_that_raises_is_told_in_its_row(monkeypatch):
    def breaks(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nfurther lines")

    row = broken(monkeypatch, breaks)
    assert not row["ok"]
    assert row["at"] == "after 0 cases: RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_kernel_that_ends_its_process_is_told_in_its_row(tmp_path, monkeypatch):
    from benchmarks.gpu.check import in_a_process

    (tmp_path / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, ROOT))))
    row = in_a_process("swoosh", "cpu", "bfloat16")
    assert not row["ok"]
    assert row["at"] == "the process ended with -11: no message"


def results(where, dtype, wrong):
    """An encoder's, in float64 exact, else off by two of the dtype's epsilons; on ``auto`` wrong in one of three."""
    eps = 0.0 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    found = {name: torch.full((3,), 1.0 + eps, dtype=torch.float64) for name in ("evaluated", "output", "weight")}
    if where == "auto" and wrong is not None:
        found[wrong] = found[wrong] * 1.5
    return found


@pytest.mark.parametrize("wrong", [None, "evaluated", "output", "weight"])
def test_a_wrong_encoder_is_told(monkeypatch, tmp_path, capsys, wrong):
    from benchmarks.gpu import found, model

    monkeypatch.setattr(model, "results", lambda peer, where, dtype: results(where, dtype, wrong))
    told = found.Found(tmp_path / "right.json", "right")
    model.right(told)
    assert {row["backend"]: row["ok"] for row in told.rows}["auto"] == (wrong is None)
    assert capsys.readouterr().out.startswith("ok " if wrong is None else "BAD")


def test_without_upstream_ours_is_checked_and_timed_all_the_same(monkeypatch, tmp_path):
    from benchmarks.gpu import found, model

    peers = []
    monkeypatch.setattr(model.models, "unserved", lambda peer: "it is not installed" if peer == "upstream" else None)
    monkeypatch.setattr(model, "results", lambda peer, where, dtype: peers.append(peer) or results(where, dtype, None))
    told = found.Found(tmp_path / "right.json", "right")
    model.right(told)
    assert set(peers) == {"ours"}
    assert "against" in told.rows[0]
    for peer in model.PEERS:
        model.timed(told, f"train {peer}", lambda: lambda: torch.zeros(9), 2)
    assert told.rows[-1]["skipped"] == "it is not installed"
    assert len(told.rows[-2]["ms"]) == 2
    assert not any("failed" in row for row in told.rows)


def test_a_kernel_that_is_timed_has_all_its_rows(tmp_path, capsys):
    """And one that fails has a row, and the others theirs."""
    from benchmarks.gpu import found, table

    told = found.Found(tmp_path / "table.json", "table")
    rows = [row for row in table.rows(["swoosh", "bypass"]) if row["backend"] == "cpu"]
    failing = dataclasses.replace(rows[1]["case"], inputs=lambda *_: 1 / 0)
    for row in (rows[0], rows[1] | {"case": failing}, rows[2]):
        table.add(told, row)
    written = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row.get("direction") for row in written] == [*DIRECTIONS, None, *DIRECTIONS]
    assert "ZeroDivisionError" in written[3]["failed"]
    forward, both, backward = written[:3]
    assert backward["median_us"] == pytest.approx(both["median_us"] - forward["median_us"], rel=1e-9)
    assert backward["bytes"] == both["bytes"] - forward["bytes"] > 0
    assert len(capsys.readouterr().out.splitlines()) == len(written)


def test_a_build_that_fails_is_told(tmp_path):
    """With a compiler that is none, and a module that cannot be imported."""
    hidden = "raise ImportError('built for another machine')"
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "class Hidden(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'zipformer_kernels._native':\n"
        f"            {hidden}\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "zipformer_kernels").glob("_*")}
    result = subprocess.run(
        [sys.executable, str(STAGES / "prepared.py"), "use", str(tmp_path / "nothing")],
        env=environment(tmp_path, CXX="no-such-compiler", TORCH_CUDA_ARCH_LIST=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "compiling for" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "zipformer_kernels").glob("_*")}


def test_what_was_prepared_for_something_else_does_not_fit(tmp_path):
    code = f"""
import json, pathlib
from benchmarks.gpu import prepared
folder = pathlib.Path({str(tmp_path)!r})
for change in ("", "python", "target"):
    made = prepared.manifest(("9.0",))
    if change == "python":
        made["module"][0] = made["triton"][0] = ".cpython-27.so"
    (folder / prepared.MANIFEST).write_text(json.dumps(made))
    targets = ("8.0",) if change == "target" else ("9.0",)
    print(change, *(prepared.fits(folder, part, targets) for part in ("module", "triton")))
print(prepared.fits(folder / "nothing", "module", ("9.0",)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.stdout.splitlines() == [" True True", "python False False", "target False False", "False"], (
        result.stderr
    )
