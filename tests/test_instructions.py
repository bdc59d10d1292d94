"""benchmarks/instructions.py: what it reads from a binary, its model of a GPU, and the page it writes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from compiled import all_targets

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import page, roofline, sass, trips  # noqa: E402

# A loop around a call that hardly happens, as cuobjdump prints it; most encodings are left out.
TEXT = """
\tcode for sm_90
\t\tFunction : _ZN2zk4loopEPf
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   S2R R3, SR_CTAID.X ;                  /* 0x0000000000037919 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0000000000037919 */
        /*0020*/                   MUFU.EX2 R5, R4 ;
        /*0030*/                   FFMA R5, R5, R6, R7 ;
        /*0040*/               @P0 BRA 0x70 ;
        /*0050*/                   MOV R8, 0x60 ;
        /*0060*/                   CALL.REL.NOINC 0x100 ;
        /*0070*/                   HGMMA.64x32x16.F32.BF16 R24, R8, gdesc[UR8], R24 ;
        /*0080*/                   HMMA.16816.F32.BF16 R24, R8, R10, R24 ;
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*00a0*/              @!P1 BRA 0x10 ;
        /*00b0*/                   IADD3 R1, R1, 0x8, RZ ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0 ;
        /*0100*/                   FADD R5, R5, R5 ;
        /*0110*/                   RET.REL.NODEC R8 0x0 ;
"""
USAGE = (
    " Function _ZN2zk4loopEPf:\n  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
)


# Masks of a tile, which a branch skips where there are none.
MASKED = """
\t\tFunction : _ZN2zk6maskedEPf
        /*0000*/                   LDS R4, [R2] ;
        /*0010*/               @P0 BRA 0x60 ;
        /*0020*/                   LDG.E.U8 R5, desc[UR4][R2.64] ;
        /*0030*/                   VOTE.ANY R6, PT, P1 ;
        /*0040*/                   FSEL R4, R4, -INF, P2 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/                   VOTE.ANY R6, PT, P1 ;
        /*0080*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def kernel():
    return sass.parse(TEXT, USAGE)["_ZN2zk4loopEPf"]


def test_a_kernel_is_read_from_what_cuobjdump_prints(kernel):
    assert (kernel.registers, kernel.shared, kernel.spills) == (40, 1024, 8)
    assert [one.opcode for one in kernel.main][-2:] == ["IADD3", "EXIT"], "the subroutine is no part of it"
    assert [(loop.first, loop.last, loop.depth) for loop in kernel.loops] == [(1, 10, 0)]
    pipes = Counter(one.pipe for one in kernel.main)
    assert pipes["tensor"] == 2
    assert pipes["lsu"] == 2
    assert pipes["mufu"] == pipes["fma"] == 1


def test_tiles_that_masks_touch_are_not_counted():
    """But a vote that no branch skips is."""
    usage = USAGE.replace("4loop", "6masked")
    kernel = sass.parse(TEXT + MASKED, USAGE + usage)["_ZN2zk6maskedEPf"]
    often = trips.executed("attention.average", True, kernel, {})
    assert [one.opcode for one in kernel.main if often[one] == 0] == ["LDG.E.U8", "VOTE.ANY", "FSEL", "MUFU.EX2"]
    assert sum(often.values()) == 5
    assert sum(trips.executed("swoosh.forward", True, kernel, {}).values()) == 9, "other kernels have no masks"


def test_instructions_are_counted_by_trips_without_what_hardly_runs(kernel):
    often = {one.opcode: count for one, count in kernel.executed(lambda loop: 5).items()}
    assert often["MUFU.EX2"] == often["LDG.E.128"] == 5
    assert often["MOV"] == often["CALL.REL.NOINC"] == 0
    assert often["S2R"] == often["EXIT"] == 1


def test_accesses_and_products_have_their_widths(kernel):
    found = {one.opcode: (one.global_bytes, one.matrix_flops) for one in kernel.main}
    assert found["LDG.E.128"] == (16, 0)
    assert found["STG.E.U16"] == (2, 0)
    assert found["HMMA.16816.F32.BF16"] == (0, 2 * 16 * 8 * 16)
    assert found["HGMMA.64x32x16.F32.BF16"] == (0, 2 * 64 * 32 * 16 // 4)


def test_a_kernel_with_loops_needs_a_rule(kernel):
    with pytest.raises(trips.NoRule, match=r"swoosh\.loop has 1 loops"):
        trips.executed("swoosh.loop", True, kernel, {})
    often = trips.executed("attention.aggregate_kernel", False, kernel, {"S": 1500, "BN": 32})
    assert {one.opcode: count for one, count in often.items()}["MUFU.EX2"] == 47


def test_diagonals_are_walked_over_as_often_as_there_are_scores():
    for targets in (1536, 512):
        scores = 0
        for first in range(0, 1500, targets):
            n = {"T": 1500, "S": 1500, "targets": targets, "first": first // 16, "BM": 64, "BN": 64}
            blocks = -(-(1500 + targets - 1) // 64)
            scores += trips.position_gradient(n, Counter(), 0) * blocks * 64 * 64
        assert 1.0 < scores / 1500**2 < 1.2


def test_of_two_walks_the_one_with_the_penalty_runs_where_there_is_one():
    n = {"S": 1500, "BM": 64, "BN": 32, "num_warps": 4, "packed": 168, "BC": 64}
    bodies = Counter(FSETP=40), Counter(FSETP=8)
    assert [trips.score_gradient(n | {"penalty": 0.0}, body, 0) for body in bodies] == [0, 47]
    assert [trips.score_gradient(n | {"penalty": 0.1}, body, 0) for body in bodies] == [47, 0]
    assert trips.score_gradient(n, Counter(), 1) == 3


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # all 64 warps
        (33, 256, 0, 6),  # 40 registers: 12 warps a scheduler
        (128, 128, 0, 4),
        (182, 256, 16384, 1),  # 2 warps a scheduler
        (255, 32, 0, 8),
        (16, 32, 0, 32),  # no more than 32 blocks
        (32, 128, 100 * 1024, 2),
    ],
)
def test_blocks_that_a_multiprocessor_holds(registers, threads, shared, blocks):
    assert roofline.resident_blocks(registers, threads, shared) == blocks


def work(**changes):
    given = {"blocks": 132 * 800, "warps": 8, "resident": 8, "matrix_flops": 0.0, "rounds": 1, "bytes": 0}
    return roofline.Work(**{"pipes": Counter({"fma": 100.0, "mufu": 10.0})} | given | changes)


def test_the_longest_bound_is_the_prediction():
    assert roofline.predicted(work(bytes=3 * 10**9), roofline.H100) == (1e-3, "memory")
    assert roofline.predicted(work(blocks=1), roofline.H100) == (roofline.H100.launch, "launch")
    seconds, bound = roofline.predicted(work(), roofline.H100)
    assert bound == "issue"
    assert seconds == pytest.approx(800 * 8 * 110 / 3.0 / 1.755e9, rel=1e-9)
    seconds, bound = roofline.predicted(work(resident=1), roofline.H100)
    assert bound == "latency"
    assert seconds == pytest.approx(800 * (110 * 4 + 500) / 1.755e9, rel=1e-9)
    assert roofline.predicted(work(pipes=Counter(mufu=100.0)), roofline.H100)[1] == "mufu"


def test_the_page_is_that_of_the_committed_counts():
    counts = json.loads((ROOT / "benchmarks/results/instructions.json").read_text())
    text = (ROOT / "docs/gpu.md").read_text()
    generated = page.page(counts, ROOT / "benchmarks/results")
    assert page.rewritten(text, generated) == text, "run benchmarks/instructions.py --page"


def test_what_was_measured_fills_its_column(tmp_path):
    counts = json.loads((ROOT / "benchmarks/results/instructions.json").read_text())
    row = counts["ops"][0]
    folder = tmp_path / "nvidia-h200" / "gpu_check"
    folder.mkdir(parents=True)
    kernel = row["kernels"][0]["kernel"].split(".")[1]
    profiled = [
        {"name": f"void zk::{kernel}<float>(long)", "count": 2, "ms": 0.0444},
        {"name": f"other_{kernel}", "count": 1, "ms": 9.0},
    ]
    rows = [
        {name: row[name] for name in ("op", "backend", "case", "direction")}
        | {"median_us": 12.34, "kernels": profiled},
        {"op": "copy", "case": "1 GiB", "median_us": 1.0},
        {name: row[name] for name in ("op", "backend", "case")} | {"failed": "RuntimeError: no"},
    ]
    (folder / "table.json").write_text(json.dumps({"rows": rows}))
    written = page.page(counts, tmp_path)
    assert written.count("| H200 12.3 |") == 1
    assert written.count("| H200 22.2 |") == 1


def test_every_kernel_has_a_floor_below_its_prediction():
    counts = json.loads((ROOT / "benchmarks/results/instructions.json").read_text())
    rows = [kernel for row in counts["ops"] for kernel in row["kernels"]]
    assert {row["op"] for row in counts["ops"]} >= {"swoosh", "bias_norm", "attention", "scaled_adam"}
    for row in rows:
        for machine in ("H100", "H200"):
            assert row["floor_us"][machine] <= row["predicted_us"][machine] * 1.001, row["kernel"]


SCRIPT = """
from benchmarks.gpu import recording
import torch
from zipformer_kernels import swoosh_l

with recording.recording() as launches:
    x = torch.empty(1500, 30, 512, dtype=torch.bfloat16)
    y = swoosh_l(x) + 1
    y = y.view(-1)
print([(one.kind, one.name, one.grid[0], one.bytes) for one in launches], tuple(y.shape))
"""


def test_a_model_is_recorded_without_computing():
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    n = 1500 * 30 * 512
    wanted = [("triton", "swoosh.forward_kernel", n // 1024, 4 * n), ("torch", "add", 1, 4 * n)]
    assert result.stdout.strip() == f"{wanted} ({n},)", result.stderr


CUDA = """
from benchmarks.gpu import counts, recording
from zipformer_kernels.ops.bias_norm import _op, cases

native, kernels = recording.load_module(recording.build_module()), counts.Kernels("bias_norm")
(case,) = (case for case in cases.CASES if case.name == counts.STACKS[0])
for direction, launches, args in counts.both_ways(native, _op, _op.backends["cuda"], case):
    row = counts.op_row("bias_norm", case, "cuda", direction, launches, args, kernels)
    print([one["kernel"] for one in row["kernels"]], row["kernels"][0]["bytes"] > 10**7)
"""


def test_cuda_kernels_are_recorded():
    if all_targets()[1]:
        pytest.skip(f"nvcc would run this: {all_targets()[1]}")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", CUDA], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.stdout.splitlines() == [
        "['bias_norm.forward_in_registers'] True",
        "['bias_norm.backward_in_registers', 'bias_norm.add_parts'] True",
    ], result.stderr


def test_shapes_of_parameters_are_those_of_the_model():
    from benchmarks.harness import models
    from zipformer_kernels.ops.scaled_adam.cases import parameters

    with torch.device("meta"):
        model = models.model("ours", "S")
    assert Counter(parameters("S")) == Counter(tuple(p.shape) for p in model.parameters())


def test_to_plan_a_step_of_the_optimizer_is_a_small_part_of_it():
    """One block plans for all tensors, while the rest of the GPU waits."""
    counts = json.loads((ROOT / "benchmarks/results/instructions.json").read_text())
    rows = [row for row in counts["ops"] if row["op"] == "scaled_adam"]
    assert {row["backend"] for row in rows} == {"triton", "cuda"}
    for row in rows:
        alone = [
            kernel for kernel in row["kernels"] if kernel["kernel"].split(".")[1] in ("sums_kernel", "plan_kernel")
        ]
        assert len(alone) == 2
        for gpu, whole in row["predicted_us"].items():
            assert sum(kernel["predicted_us"][gpu] for kernel in alone) <= 0.05 * whole
