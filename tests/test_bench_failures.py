"""What fails in a benchmark is one peer's reason: the others go on, and files hold all that was known."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.harness import job, machine, models, peers, process, results, suite, timing
from benchmarks.harness.job import Job, Measured
from benchmarks.harness.peers import Agreement, Prepared, Unserved

RATES = {"copy_bytes_per_s": 1e10, "matrix_flops_per_s": {"float32": 1e11}}

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28.00 GiB.\nmore of it")
ERRORS = {
    "a bug": (RuntimeError("shapes differ\nat some length"), "RuntimeError: shapes differ"),
    "the GPU's memory": (
        MEMORY,
        "it runs out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 28.00 GiB.",
    ),
    "no message": (AssertionError(), "AssertionError: without a message"),
    "two lines": (ValueError("backend raised:\n\nno such op"), "ValueError: backend raised: no such op"),
}


@pytest.mark.parametrize(("error", "reason"), ERRORS.values(), ids=ERRORS)
def test_reasons_are_one_line(error, reason):
    assert peers.told(error) == reason


def test_a_cpus_memory_is_told_plainly():
    run, reason = peers.attempt(torch.empty, 1 << 60)
    assert run is None
    assert reason.startswith("it runs out of memory: RuntimeError: ")


# ---- stages ----


def fails_from(call):
    """A function that raises from this call on."""
    calls = []

    def run():
        calls.append(1)
        if len(calls) >= call:
            raise MEMORY

    return run


def made_of(runs):
    """A job of these functions; a peer without one cannot be made."""

    def make(peer):
        if runs[peer] is None:
            raise MEMORY
        return runs[peer]

    return Job("b", "c", "both", torch.float32, tuple(runs), partial(peers.prepare, make=make), rounds=3, seconds=0.0)


@pytest.mark.parametrize("fails", [None, fails_from(1), fails_from(3)], ids=["made", "warmed up", "timed"])
def test_a_peer_that_fails_is_a_row_and_the_others_go_on(fails):
    its = made_of({"a": time.time, "bad": fails, "c": time.time})
    found = its.measure(RATES)
    assert [(row["peer"], len(row["samples_s"]), set(row["times_as_long"])) for row in found.rows] == [
        ("a", 3, {"c"}),
        ("c", 3, {"a"}),
    ]
    assert found.failed == [{**its.key, "peer": "bad", "reason": peers.told(MEMORY)}]
    content = results.content("b", {}, RATES, found)
    assert content["skipped"] == found.failed


def test_a_peer_whose_usage_cannot_be_counted_keeps_its_times(monkeypatch):
    def count(run):
        if run is not time.time:
            raise RuntimeError("no counters")
        return 1

    monkeypatch.setattr(job, "USAGE", {"peak_bytes": count, "launches": count})
    found = made_of({"a": time.time, "b": time.monotonic}).measure(RATES)
    assert [(row["peer"], row["peak_bytes"], row["launches"]) for row in found.rows] == [("a", 1, 1), ("b", None, None)]
    assert [row["reason"] for row in found.failed] == [
        "its peak_bytes: RuntimeError: no counters",
        "its launches: RuntimeError: no counters",
    ]


def test_a_peer_that_cannot_be_captured_is_told_and_timed_as_it_is(monkeypatch):
    def captured(run):
        if run is time.monotonic:
            raise RuntimeError("operation not permitted when stream is capturing")
        return time.perf_counter

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "DEVICE", torch.device("cuda"))
    failures = {}
    found = timing.replays({"a": time.time, "b": time.monotonic, "c": time.time}, failures.__setitem__)
    assert found == {"a": time.perf_counter, "c": time.perf_counter}
    assert failures == {"b": "RuntimeError: operation not permitted when stream is capturing"}


def test_a_job_that_fails_as_a_whole_is_a_row_for_each_peer():
    def prepare(wanted):
        raise RuntimeError("no inputs")

    its = Job("b", "c", "both", torch.float32, ("x", "y"), prepare)
    found = its.measure(RATES, ("y",))
    assert found == Measured(failed=[{**its.key, "peer": "y", "reason": "RuntimeError: no inputs"}])


def test_a_benchmark_whose_jobs_cannot_be_made_is_a_row(monkeypatch, tmp_path):
    def jobs(every):
        raise RuntimeError("no such preset")

    monkeypatch.setitem(suite.MODELS, "broken", jobs)
    monkeypatch.setattr(suite.rates, "measure", lambda: RATES)
    found = suite.run(suite.steps(["broken"]), tmp_path, lambda step, found: None)
    assert [row["reason"] for row in found["broken"].failed] == ["RuntimeError: no such preset"]
    assert results.read(tmp_path / "broken.json")["skipped"] == found["broken"].failed


def test_interrupts_pass():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_of({"a": interrupted}).measure(RATES)


def test_memory_of_a_failed_peer_is_free_before_the_next_is_made():
    held = []

    def make(peer):
        if peer == "bad":
            x = torch.ones(3)
            x.itself = [x]  # only the garbage collector sees through that
            held.append(weakref.ref(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None
        return time.time

    gc.disable()
    try:
        prepared = peers.prepare(["bad", "good"], make)
    finally:
        gc.enable()
    assert (set(prepared.runs), set(prepared.failed)) == ({"good"}, {"bad"})


# ---- agreement ----


def test_the_first_peer_that_runs_is_what_the_others_are_checked_against():
    values = {"late": 1.0, "same": 1.0, "off": 1.1, "lost": float("nan")}
    agreement = Agreement(lambda a, b: abs(a - b), 0.01, "reference")

    def make(peer):
        if peer == "reference":
            raise MEMORY
        agreement.check(peer, values[peer])
        return time.time

    prepared = peers.prepare(["reference", *values], make, agreement)
    assert list(prepared.runs) == ["late", "same"]
    assert prepared.wrong == {"off": "it is off by 1.0e-01 from late", "lost": "it is off by nan from late"}
    assert prepared.unchecked == {"late": "reference does not run here; the others are checked against this"}


def test_a_row_says_that_its_peer_was_not_checked():
    its = Job(
        *("b", "c", "both", torch.float32, ("a", "b")),
        lambda wanted: Prepared(runs=dict.fromkeys(wanted, time.time), unchecked={"b": "it draws"}),
        rounds=1,
        seconds=0.0,
    )
    assert [row.get("unchecked") for row in its.measure(RATES).rows] == [None, "it draws"]


# ---- processes ----


def peers_that_die(folder, wanted):
    """A job's `prepare`; some peers die in a process that is not the one of this file."""

    def make(peer):
        here = (folder / "pid").read_text() == str(os.getpid())
        if peer == "dies at once" and not here:
            os._exit(3)
        if peer == "cannot be made there" and not here:
            raise Unserved("not there")
        return kill if peer == "is killed" and not here else time.time

    return peers.prepare(wanted, make)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(machine.DEVICE.type != "cpu", reason="on a GPU peers share a process")
def test_peers_apart_that_die_are_rows(tmp_path):
    (tmp_path / "pid").write_text(str(os.getpid()))
    all_peers = ("dies at once", "is killed", "cannot be made there", "lives")
    prepare = partial(peers_that_die, tmp_path)
    its = Job("b", "c", "both", torch.float32, all_peers, prepare, rounds=2, seconds=0.0, apart=True)
    found = its.measure(RATES)
    assert [row["peer"] for row in found.rows] == ["lives"]
    assert {row["peer"]: row["reason"] for row in found.failed} == {
        "dies at once": "its process ended with exit code 3",
        "is killed": "its process was killed, as systems do when memory runs out",
        "cannot be made there": "not there",
    }


class Brittle(suite.Place):
    """A place whose processes die of "bad", and of which "poor" wants more than it leaves to others."""

    def __init__(self):
        super().__init__(apart=True)
        self.renewed = 0

    def call(self, function, name, every, index, reached, wanted):
        its = suite.jobs(name, every)[index]
        if "bad" in wanted:
            raise process.Died("it died")
        if len(wanted) > 1:
            return its.all_failed(wanted, "it runs out of memory")
        return Measured(rows=[{**its.key, "peer": peer, "median_s": 1.0, "times_as_long": {}} for peer in wanted])

    def renew(self, at_once=False):
        self.renewed += 1


def test_peers_that_failed_together_are_tried_again_alone(monkeypatch):
    its = Job("b", "c", "both", torch.float32, ("a", "bad", "poor"), lambda wanted: Prepared())
    monkeypatch.setitem(suite.MODELS, "b", lambda every: [its])
    place = Brittle()
    (step,) = suite.steps(["b"])
    found = suite._try(place, step, RATES)
    assert [row["peer"] for row in found.rows] == ["a", "poor"]
    assert found.failed == [{**its.key, "peer": "bad", "reason": "it died"}]
    assert found.rows[0]["times_as_long"] == {"poor": 1.0}
    assert place.renewed == 2


# ---- steps ----


def test_compiled_peers_come_last_and_can_be_left_out(monkeypatch):
    def jobs(name, every):
        for case in "12":
            yield Job(name, case, "both", torch.float32, ("eager", "compiled", "ours"), None)

    for name in "xy":
        monkeypatch.setitem(suite.MODELS, name, partial(jobs, name))

    def planned(**how):
        return [(step.name, step.job.case, *step.peers) for step in suite.steps(["x", "y"], **how)]

    called = [(name, case, "eager", "ours") for name in "xy" for case in "12"]
    assert planned(compiled=False) == called
    assert planned(compiled_last=True) == called + [(name, case, "compiled") for name in "xy" for case in "12"]
    assert planned(compiled_last=False) == [(name, case, "eager", "compiled", "ours") for name in "xy" for case in "12"]


def test_a_peer_measured_alone_is_checked_against_the_first():
    asked = []

    def prepare(wanted):
        asked.append(wanted)
        return Prepared(runs=dict.fromkeys(wanted, time.time))

    its = Job("b", "c", "both", torch.float32, ("first", "x", "y"), prepare, rounds=1, seconds=0.0)
    assert [row["peer"] for row in its.measure(RATES, ("y",)).rows] == ["y"]
    assert asked == [("first", "y")]


# ---- files ----


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "x.json"
    results.write(path, {"rows": [], "n": 1})

    def full(source, target):
        assert json.loads(Path(source).read_text())["n"] == 2
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(results.ResultsError, match="No space left"):
        results.write(path, {"rows": [], "n": 2})
    assert json.loads(path.read_text())["n"] == 1


def gone(pid):
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(holds, seconds=120.0):
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="it asks Linux whether a process is there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_what_it_knew_and_no_process(number, tmp_path):
    script = Path(__file__).parent / "interrupted_bench.py"
    environment = os.environ | {"PYTHONPATH": str(machine.ROOT)}
    run = subprocess.Popen([sys.executable, script, tmp_path], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until((tmp_path / "asleep").exists)
        worker = int((tmp_path / "asleep").read_text())
        assert worker != run.pid
        run.send_signal(number)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == -number
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    until(partial(gone, worker))
    found = results.read(tmp_path / "quick.json")
    assert [(row["case"], row["peer"]) for row in found["rows"]] == [("done", "a"), ("done", "b")]
    assert found["skipped"] == found["wrong"] == []
    assert {path.name for path in tmp_path.iterdir()} == {"quick.json", "asleep"}


# ---- models ----


def test_a_failed_capture_is_that_peers_reason_only(monkeypatch):
    def captured(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    def linear(peer):
        torch.manual_seed(0)
        return torch.nn.Linear(3, 3)

    def x():
        return torch.ones(2, 3, device=machine.DEVICE)

    monkeypatch.setattr(models, "captured", captured)
    wanted = ("ours", models.OURS_AS_GRAPH)
    run, probe = partial(models.inference, x, torch.float32), partial(models.evaluated, x)
    prepared = models.prepare(linear, run, probe, torch.float32, wanted)
    assert set(prepared.runs) == {"ours"}
    assert prepared.failed == {models.OURS_AS_GRAPH: "RuntimeError: operation not permitted when stream is capturing"}
