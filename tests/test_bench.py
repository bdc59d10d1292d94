"""The measuring core: statistics, verdicts, results files, peers that agree, and the command on a tiny case."""

import ast
import graphlib
import importlib
import json
import logging
import math
import os
import pickle
import random
import subprocess
import sys
from fractions import Fraction
from functools import partial

import pytest
import torch
import upstream  # noqa: F401  it must be there, or no peer of upstream's would be tested
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import (
    __main__,
    job,
    length,
    machine,
    op_jobs,
    optimizer,
    others,
    process,
    rates,
    rel_pos_attention,
    results,
    shared_attention,
    statistics,
    suite,
)
from benchmarks.harness.compare import compare
from benchmarks.harness.peers import Prepared
from zipformer_kernels.core import backend
from zipformer_kernels.ops import attention
from zipformer_kernels.ops.attention import held
from zipformer_kernels.ops.attention.cases import CASES as ATTENTION

RATES = {"copy_bytes_per_s": 1e10, "matrix_flops_per_s": {"float32": 1e11}}


# ---- statistics ----


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=40))
def test_the_interval_holds_the_median_of_the_samples(samples):
    low, high = statistics.median_interval(samples)
    assert min(samples) <= low <= statistics.median(samples) <= high <= max(samples)


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high = statistics.median_interval([draw.expovariate(1.0) for _ in range(15)])
        hits += low <= 0.6931 <= high
    assert 0.95 <= hits / 2000 <= 0.98  # of 15 samples the 4th and the 12th: 96.5%


def counted(n):
    """The rank of the interval's end by its definition, in fractions."""
    tail = Fraction(1, 40)
    return max(1, sum(sum(math.comb(n, i) for i in range(k)) <= tail * 2**n for k in range(1, (n + 1) // 2 + 1)))


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 8, 9, 15, 16, 17, 100, 101, 400])
def test_the_intervals_rank_is_exact(n):
    assert statistics.interval_rank(n) == counted(n)


@pytest.mark.parametrize(("n", "rank"), [(1_100, 518), (2_000, 956), (2_001, 957), (10_000, 4_902), (100_000, 49_690)])
def test_intervals_of_many_samples(n, rank):
    """Beyond `EXACT` the normal law is used, which may be one off, to the safe side."""
    assert rank - (n > statistics.EXACT) <= statistics.interval_rank(n) <= rank
    low, high = statistics.median_interval([float(i) for i in range(1, n + 1)])
    assert low + high == n + 1
    assert low <= (n + 1) / 2


def test_the_normal_law_is_at_most_one_rank_to_the_safe_side(monkeypatch):
    exact = {n: statistics.interval_rank(n) for n in range(100, 2000, 37)}
    monkeypatch.setattr(statistics, "EXACT", 0)
    assert {exact[n] - statistics.interval_rank(n) for n in exact} <= {0, 1}


def test_percentiles_and_ratios():
    assert statistics.percentile([3.0, 1.0, 2.0], 0.75) == 2.5
    assert statistics.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert statistics.ratio([2.0, 6.0, 20.0], [1.0, 2.0, 2.0]) == 3.0
    with pytest.raises(ValueError, match="at least one"):
        statistics.median([])


# ---- verdicts ----


def row(median, low, high, samples=9):
    return {"median_s": median, "interval_s": [low, high], "samples_s": [median] * samples}


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (row(1.5, 1.4, 1.6), "regression"),
        (row(0.5, 0.4, 0.6), "improvement"),
        (row(1.15, 1.05, 1.3), "noise"),  # the intervals overlap
        (row(1.03, 1.11, 1.2), "noise"),  # too little to tell one boot from another
        (row(1.2, 1.2, 1.2, samples=1), "noise"),  # too few
        (row(1.3, 1.3, 1.3, samples=1), "regression"),
    ],
)
def test_verdicts(after, verdict):
    (change,) = compare({("k",): row(1.0, 0.9, 1.1)}, {("k",): after})
    assert change.verdict == verdict


def test_rows_in_one_set_only_are_named():
    changes = compare({("a",): row(1, 1, 1)}, {("b",): row(1, 1, 1)})
    assert {change.key: change.verdict for change in changes} == {("a",): "missing", ("b",): "new"}


# ---- peers ----


def test_gradients_that_are_off_are_found_in_any_layout():
    y, dx, dw = torch.ones(2), torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    joined = torch.tensor([4.0, 0.0, 3.0])
    assert op_jobs.off([y, joined], [y, dx, dw], alike=False) == 0.0
    assert op_jobs.off([y, 2 * joined], [y, dx, dw], alike=False) == pytest.approx(1.0, rel=1e-6)
    assert op_jobs.off([y, dx, 1.5 * dw], [y, dx, dw], alike=True) == pytest.approx(0.5, rel=1e-6)
    assert op_jobs.off([y, dx, 1e-8 + 0 * dw], [y, dx, 0 * dw], alike=True) < 1e-8
    with pytest.raises(ValueError, match="longer than"):
        op_jobs.off([y, dx], [y, dx, dw], alike=True)


@pytest.mark.parametrize("stored", [True, False])
def test_all_uses_of_a_layers_weights_agree_whether_they_are_stored_or_not(monkeypatch, stored):
    asked = []
    monkeypatch.setattr(held, "fits", lambda *given: asked.append(given) or stored)
    prepared = shared_attention.prepare(100, 1, 2, 24, "both", torch.float32, ("upstream", "eager", "ours"))
    assert (prepared.wrong, prepared.skipped) == ({}, {})
    assert set(prepared.runs) == {"upstream", "eager", "ours"}
    assert asked or backend.missing["cpu"] or torch.cuda.is_available()


def test_a_plain_conformers_attention_agrees_with_ours():
    prepared = rel_pos_attention.prepare(70, 2, 2, "both", torch.float32, ("plain", "ours"))
    assert (prepared.wrong, prepared.unchecked, set(prepared.runs)) == ({}, {}, {"plain", "ours"})


def test_an_optimizer_that_does_nothing_is_not_timed(monkeypatch):
    made = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    monkeypatch.setattr(optimizer, "parameters", lambda name: made)
    monkeypatch.setattr(optimizer, "step", lambda peer, made: lambda: made[0].data.add_(peer != "upstream"))
    prepared = optimizer.prepare("S", ("eager", "upstream"))
    assert set(prepared.runs) == {"eager"}
    assert "off by" in prepared.wrong["upstream"]


def test_every_takes_awkward_cases_that_are_not_empty():
    few, all_ = ({case.name for case in op_jobs.cases_of("conv_module", every)} for every in (False, True))
    assert few < all_
    assert "odd sizes, padded" in all_
    assert "no frames" not in all_


@pytest.mark.parametrize("op", op_jobs.names())
def test_upstream_computes_what_the_op_computes(op):
    """On the op's first small case that upstream has a way to do."""
    for case in importlib.import_module(f"zipformer_kernels.ops.{op}.cases").CASES:
        if case.large or case.name in ("no frames", "one frame"):
            continue
        try:
            others.OTHERS[op]["upstream"](*case.inputs(torch.float32, "cpu"))
        except others.Unserved:
            continue
        prepared = op_jobs.prepare(op, case, "both", torch.float32, ("upstream",))
        assert prepared.wrong == {}
        assert "upstream" in prepared.runs
        return
    pytest.fail("no case was tried")


@pytest.mark.parametrize("op", op_jobs.names())
def test_peers_agree_in_bfloat16(op):
    """Upstream's Swoosh + dropout + linear runs in it on a GPU only: its backward pass enters CUDA's autocast."""
    case = next(case for case in op_jobs.cases_of(op, every=True) if not case.large and case.name != "one frame")
    wanted = ("cpu",) if op == "swoosh_linear" else ("cpu", "upstream")
    prepared = op_jobs.prepare(op, case, "both", torch.bfloat16, wanted)
    assert (prepared.wrong, prepared.failed) == ({}, {})
    assert set(prepared.runs) | set(prepared.skipped) == set(wanted)


def test_a_gpu_times_what_models_run_in(monkeypatch):
    monkeypatch.setattr(op_jobs, "DTYPES", (torch.bfloat16,))
    dtypes = {op: {job.dtype for job in op_jobs.jobs(op)} for op in op_jobs.names()}
    residual = {"bias_norm", "bypass"}
    assert all(dtypes[op] == {torch.bfloat16} for op in dtypes.keys() - residual)
    assert all(dtypes[op] == {torch.bfloat16, torch.float32} for op in residual)
    its = next(op_jobs.jobs("swoosh"))
    assert its.key["dtype"] == "bfloat16"
    assert its.title.endswith(", bfloat16")


@pytest.mark.parametrize("op", ["attention", "nonlin_attention"])
def test_what_holds_every_pair_of_frames_is_not_tried_where_it_does_not_fit(op, monkeypatch):
    case = importlib.import_module(f"zipformer_kernels.ops.{op}.cases").CASES[0]
    monkeypatch.setattr(op_jobs, "memory_bytes", lambda: case.dense(4) - 1)
    prepared = op_jobs.prepare(op, case, "both", torch.float32, ("eager", "compiled", "cpu", "upstream"))
    assert set(prepared.skipped) - {"cpu"} == {"eager", "compiled", "upstream"}
    assert "at once" in prepared.skipped["eager"]
    assert set(prepared.unchecked) == set(prepared.runs) == {"cpu"} - set(prepared.skipped)
    assert op_jobs.prepare(op, case, "both", torch.bfloat16, ("eager",)).skipped == {}


def test_the_machine_has_memory():
    assert machine.memory_bytes() > 1 << 28


def test_on_a_gpu_the_optimizers_step_is_a_graph_and_a_call(monkeypatch):
    assert [its.graphs for its in optimizer.jobs()] == [()] or torch.cuda.is_available()
    monkeypatch.setattr(optimizer, "ON_GPU", True)
    graph, called = optimizer.jobs()
    assert set(graph.graphs) == {*backend.BACKENDS, optimizer.ADAMW}
    assert (called.graphs, called.key) == ((), graph.key | {"case": f"{graph.case}, called"})
    assert optimizer.step(optimizer.ADAMW, [torch.nn.Parameter(torch.ones(2))]).__self__.defaults["capturable"]


def test_flex_attention_computes_the_same():
    from torch.nn.attention.flex_attention import flex_attention

    args = next(case for case in ATTENTION if case.name == "other head sizes").inputs(torch.float32, "cpu")
    run, inputs = others.flex(flex_attention, *args[:5])
    with torch.no_grad():  # on a CPU it takes no inputs that require gradients
        assert job.off_by(run(*(x.detach() for x in inputs)), attention._op.reference(*args)) < 1e-5


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setitem(others.OTHERS, "swoosh", {"upstream": lambda x, kind: (lambda x: x * 2, (x,))})
    case = importlib.import_module("zipformer_kernels.ops.swoosh.cases").CASES[1]
    prepared = op_jobs.prepare("swoosh", case, "forward", torch.float32, ("upstream", "eager"))
    assert set(prepared.runs) == {"eager"}
    assert "off by" in prepared.wrong["upstream"]


# ---- processes ----


def fresh_peers(wanted):
    """A job's `prepare`: functions that return the process they run in."""
    return Prepared(runs={peer: os.getpid for peer in wanted if peer != "absent"}, skipped={"absent": "by design"})


def peers_that_sign(folder, wanted):
    """The same, of functions that write their process down."""
    prepared = fresh_peers(wanted)
    prepared.runs = {peer: partial(sign, folder / peer) for peer in prepared.runs}
    return prepared


def sign(path):
    with path.open("a") as file:
        print(os.getpid(), file=file)


def whole_again(run):
    return run(), run()


def test_peers_apart_have_processes_of_their_own():
    with process.Apart(fresh_peers, "a") as a, process.Apart(fresh_peers, "b") as b:
        first, again = a.tell(whole_again)
        assert first == again
        assert len({first, process.ask(whole_again, b)[0], os.getpid()}) == 3
        assert a() is None  # results may be large: they stay there
    assert process.ask(whole_again, os.getpid) == (os.getpid(), os.getpid())


@pytest.mark.parametrize("apart", [False, True])
def test_a_job_is_measured_in_turns_here_and_apart(apart, tmp_path):
    prepare, peers = partial(peers_that_sign, tmp_path), ("a", "absent", "b")
    its = job.Job("b", "c", "forward", torch.float32, peers, prepare, rounds=2, seconds=0.0, apart=apart)
    found = its.measure(RATES)
    assert [row["peer"] for row in found.rows] == ["a", "b"]
    assert all(len(row["samples_s"]) == 2 for row in found.rows)
    assert found.skipped == [{**its.key, "peer": "absent", "reason": "by design"}]
    (a,), (b,) = ({int(line) for line in (tmp_path / peer).read_text().split()} for peer in "ab")
    assert len({a, b, os.getpid()}) == (3 if apart and machine.DEVICE.type == "cpu" else 1)


def test_a_peer_that_fails_apart_says_why():
    with pytest.raises(process.Failed, match="by design"):
        process.Apart(fresh_peers, "absent")


def test_jobs_whose_peers_run_apart_can_be_sent_to_them():
    apart = [its for name in suite.MODELS for its in suite.jobs(name, every=True) if its.apart]
    models = {"conv-embed", "encoder-forward", "training-step", "streaming-chunk", "encoder-products"}
    models |= {"rel-pos-attention"}
    assert {its.benchmark for its in apart} == models
    for its in apart:
        assert pickle.loads(pickle.dumps(its.prepare)).func == its.prepare.func


# ---- length ----


def test_a_fresh_process_reports_its_own_memory():
    """Not what its parent holds, which getrusage adds to it."""
    held = torch.ones(1 << 28)  # 1 GB
    point = length.in_fresh_process("ours", 0.05)
    assert held.numel() * 4 > 1e9 > point["peak_bytes"] > 1e8
    assert point["seconds"] > 0


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"ours on -1 minutes failed: .+"):
        length.in_fresh_process("ours", -1)


def test_the_longest_recording_and_upstreams_limit_are_measured():
    points = {(job.minutes, peer) for job in length.jobs() for peer in job.peers}
    assert {(14.0, "ours"), (3.0, "ours"), (3.0, "upstream"), (3.0, "upstream compiled")} <= points
    assert {job.minutes for job in length.jobs(every=True)} >= {30.0, 60.0}


# ---- measuring ----


@pytest.fixture
def tiny(monkeypatch):
    """The suite with one tiny benchmark."""
    case = importlib.import_module("zipformer_kernels.ops.swoosh.cases").CASES[1]

    def jobs(every):
        made = op_jobs.job("swoosh", case, "both")
        peers = ("eager", "upstream", "cuda") if not torch.cuda.is_available() else ("eager", "upstream")
        yield job.Job(**{**vars(made), "benchmark": "tiny", "peers": peers, "seconds": 0.0})

    monkeypatch.setitem(suite.MODELS, "tiny", jobs)
    monkeypatch.setattr(rates, "measure", lambda: RATES)


def test_calls_apart_share_one_fresh_process_until_it_is_renewed():
    with suite.Place(apart=True) as place:
        first, again = place.call(os.getpid), place.call(os.getpid)
        assert place.call(level) == logging.ERROR
        place.renew()
        renewed = place.call(os.getpid)
    assert first == again
    assert len({first, renewed, os.getpid()}) == 3
    with suite.Place(apart=False) as place:
        assert place.call(os.getpid) == os.getpid()


def level():
    return logging.getLogger().getEffectiveLevel()


@pytest.fixture
def command(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            __main__.main([*map(str, arguments)])
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err.splitlines()

    return run


def test_bench_writes_a_table_json_and_plots(command, tmp_path, tiny):
    code, out, err = command("tiny", "--output", tmp_path)
    assert (code, err) == (0, [])
    assert max(map(len, out.splitlines()[:-1])) <= 100
    assert "upstream" in out
    found = results.read(tmp_path / "tiny.json")
    assert {row["peer"] for row in found["rows"]} == {"eager", "upstream"}
    for measured in found["rows"]:
        assert len(measured["samples_s"]) >= 7
        assert measured["peak_bytes"] > 0
        assert measured["of_copy"] == pytest.approx(measured["bytes"] / measured["median_s"] / 1e10, rel=1e-9)
        assert set(measured["times_as_long"]) == {"eager", "upstream"} - {measured["peer"]}
    if not torch.cuda.is_available():
        assert [row["peer"] for row in found["skipped"]] == ["cuda"]
    assert {"device", "versions", "commit", "dirty", "date", "load_average"} <= set(found["environment"])
    assert not (tmp_path / "length.png").exists()


def test_compare_exits_with_1_only_where_something_got_slower(command, tmp_path, tiny):
    command("tiny", "--output", tmp_path)
    first, second = tmp_path / "tiny.json", tmp_path / "second.json"
    slower = json.loads(first.read_text())
    for measured in slower["rows"]:
        measured["median_s"] *= 2
        measured["interval_s"] = [3 * measured["interval_s"][1], 4 * measured["interval_s"][1]]
    second.write_text(json.dumps(slower))
    assert command("--compare", first, first)[0] == 0
    code, out, _ = command("--compare", first, second)
    assert code == 1
    assert out.count("regression") == 2
    assert command("--compare", second, first)[0] == 0


CUT = json.dumps({"format": results.FORMAT, "rows": [{"peer": "cpu"}]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ('{"rows": []}', "is not a results file"),
        ("[]", "is not a"),
        (CUT, "is not"),
    ],
)
def test_foreign_files_are_told_in_one_line(command, tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    code, out, err = command("--compare", path, path)
    assert (code, out, len(err)) == (2, "", 1)
    assert f"{path}: {message}" in err[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swish"], "OP: wanted any of attention, "),
        (["--compare", "a"], "Option '--compare' requires 2 arguments"),
        (["--compare", "a", "b"], "a: cannot be read: No such file or directory"),
        (["swoosh", "--compare", "a", "b"], "--compare: takes two files and no benchmarks, got swoosh"),
        (["swoosh", "--output", __file__], f"{__file__}: wanted a folder, and {__file__} is a file"),
        (["swoosh", "--output", f"{__file__}/a"], f"{__file__}/a: wanted a folder, and {__file__} is a file"),
    ],
)
def test_wrong_calls_are_told_in_one_line(command, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"python -m benchmarks.harness: {message}")


def test_help_names_every_benchmark():
    """Of the program as a user calls it."""
    command = [sys.executable, "-m", "benchmarks.harness", "--help"]
    result = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    text = "".join(result.stdout.split())  # names are broken at hyphens
    assert all(name in text for name in (*suite.names(), "--output", "--every", "--compare", "--no-compiled"))


def imports_of(path):
    """The names that a file imports from, anywhere in it, and those names with what is imported."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_import_goes_in_a_circle():
    paths = (machine.ROOT / "benchmarks").rglob("*.py")
    files = {".".join(path.relative_to(machine.ROOT).with_suffix("").parts): path for path in paths}
    graph = {name: files.keys() & set(imports_of(path)) for name, path in files.items()}
    assert "benchmarks.harness.job" in graph["benchmarks.harness.suite"]
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(files)


def test_pytest_runs_and_says_what_the_machine_lacks(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "test_swoosh and not linear and k2 and forward"]
    result = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "k2 is not installed" in result.stdout
