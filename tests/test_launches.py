"""How many launches a layer takes on a GPU, recorded without one: what a branch as one node is for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import all_targets

ROOT = Path(__file__).parents[1]
MOST = {  # what is drawn at random does not happen; Triton alone has more kernels of attention
    ("cuda", "eval, forward", "bfloat16 autocast"): 30,
    ("cuda", "training, forward and backward", "bfloat16 autocast"): 110,
    ("cuda", "eval, forward", "float32"): 45,
    ("cuda", "training, forward and backward", "float32"): 150,
    ("triton", "eval, forward", "bfloat16 autocast"): 37,
    ("triton", "training, forward and backward", "bfloat16 autocast"): 130,
}
UPSTREAM = {"eval, forward": 150, "training, forward and backward": 450}  # under autocast, at least

SCRIPT = """
import json, sys
from unittest import mock
import torch
from benchmarks import launches
from benchmarks.gpu import recording
from benchmarks.harness import upstream

native = recording.load_module(recording.build_module()) if sys.argv[1] == "cuda" else None
torch.manual_seed(0)
layers = {"triton": (launches.ZipformerEncoderLayer(**launches.LAYER), None)}
if native is not None:
    layers["cuda"] = layers["triton"][0], native
with upstream.activations(compiled=False):
    layers["upstream"] = upstream.load("zipformer")[0].ZipformerEncoderLayer(**launches.LAYER), None
with mock.patch("random.random", return_value=1.0):
    for name, (layer, module) in layers.items():
        for work, backward in launches.WORK.items():
            for dtype in launches.DTYPES:
                found = launches.measure(layer, backward, dtype, module)
                print(json.dumps([name, work, dtype, found["launches"], {**found["forward"], **found["backward"]}]))
"""


@pytest.fixture(scope="module")
def counted():
    """Launches, and those by name, of each backend, work and dtype."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, "triton" if all_targets()[1] else "cuda"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {tuple(row[:3]): row[3:] for row in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize(("backend", "work", "dtype"), MOST)
def test_a_layer_takes_no_more_launches(counted, backend, work, dtype):
    if (backend, work, dtype) not in counted:
        pytest.skip(f"cuda: {all_targets()[1]}")
    launches, names = counted[backend, work, dtype]
    assert launches <= MOST[backend, work, dtype], names


def test_no_weight_is_cast_by_itself(counted):
    """Under autocast: all weights in one launch, the input, positions, and what comes behind a bypass."""
    for (name, _, dtype), (_, names) in counted.items():
        if name != "upstream" and dtype == "bfloat16 autocast":
            assert names["torch._foreach_copy_"] == 1
            assert names["torch._to_copy"] <= 3, name


@pytest.mark.parametrize("work", UPSTREAM)
def test_upstreams_layer_takes_several_times_as_many(counted, work):
    assert counted["upstream", work, "bfloat16 autocast"][0] >= UPSTREAM[work]
