"""What attention may cost on a GPU, read from machine code: instructions for each score, registers, spills.

One training layer of preset L's first stack, as benchmarks/gpu/layer.py records it: T = 1500, 30 recordings, 4 heads,
bfloat16. docs/gpu.md has the counts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import all_targets

pytest.importorskip("triton", reason="triton compiles its kernels, and brings cuobjdump")

ROOT = Path(__file__).parent.parent
FORWARD = 25  # instructions of a kernel for each score that it computes or reads
BACKWARD = {  # of all kernels of three uses, for each score of the layer
    ("triton", "stored"): 60,
    ("triton", "recomputed"): 130,  # long recordings: the memory is what matters there
    ("cuda", "recomputed"): 60,
}

SCRIPT = """
import json, sys
from benchmarks.gpu import counts, layer, recording
from benchmarks.gpu.roofline import TARGETS, resident_blocks
from benchmarks.gpu.sass import disassemble
from zipformer_kernels.ops.cases import stacks

native, kinds = None, [kind for kind in layer.KINDS if kind[0] != "cuda"]
if sys.argv[1] == "cuda":
    native, kinds = recording.load_module(recording.build_module()), layer.KINDS
stack, kernels = stacks("L")[0], counts.Kernels(*counts.ATTENTION)
for backend, kind in kinds:
    for direction, recorded in layer.launches(native, stack, backend, kind):
        print(json.dumps(layer.row(stack, backend, kind, direction, recorded, kernels)))

binaries = {target: {} for target in TARGETS}
for target, machine in TARGETS.items():
    for op, path in recording.cuda_objects(*counts.ATTENTION) if native else ():
        binaries[target] |= disassemble(path, f"sm_{target.replace('.', '')}")
    for backend, kind in kinds:
        for _, recorded in layer.launches(native, stack, backend, kind, target):
            for launch in recorded:
                if launch.kind == "torch":
                    continue
                kernel = binaries[target][launch.name] if launch.kind == "cuda" else kernels(launch)[1]
                shared = launch.shared + (kernel.shared if launch.kind == "cuda" else 0)
                blocks = resident_blocks(kernel.registers, launch.threads, shared, machine)
                print(json.dumps([target, launch.name, kernel.registers, kernel.spills, blocks]))
"""


@pytest.fixture(scope="module")
def printed():
    """Rows of passes, and of kernels by target."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, "none" if all_targets()[1] else "cuda"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return [row for row in found if isinstance(row, dict)], [row for row in found if isinstance(row, list)]


def passes(printed, direction):
    return {(row["backend"], row["weights"]): row for row in printed[0] if row["direction"] == direction}


def test_forward_is_within_its_budget(printed):
    found = passes(printed, "forward")
    assert {"triton"} <= {backend for backend, _ in found}
    costs = {
        (*key, one["kernel"]): one["instructions"]
        for key, row in found.items()
        for one in row["kernels"]
        if one["of"] == "score"
    }
    assert len(costs) >= 4
    assert {key: cost for key, cost in costs.items() if cost > FORWARD} == {}


def test_backward_of_three_uses_is_within_its_budget(printed):
    found = passes(printed, "backward")
    assert {key: row["instructions"] for key, row in found.items() if row["instructions"] > BACKWARD[key]} == {}


def test_no_kernel_spills_and_two_blocks_share_a_multiprocessor(printed):
    rows = printed[1]
    assert {target for target, *_ in rows} == {"8.0", "9.0", "10.0"}
    assert [row for row in rows if row[3] > 0] == []
    assert [row for row in rows if row[4] < 2] == []
