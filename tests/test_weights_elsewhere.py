"""Weights that are brought when a module is called, and taken away after: FSDP around layers and their parts,
accelerate's offloading; and parts that are computed again.

Between calls a parameter is on device ``meta`` or has no memory, so a weight may be read only while its own module
runs, and what brings it back for the backward pass must find tensors in what the module returned. Upstream's model is
treated alike.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import sharded_models
import torch
import upstream_models
from draws import seed_all
from sharded_models import CHUNKS, KINDS, MODES, PARTS, SIDES, result
from tolerances import PARITY, assert_parity
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from upstream_models import build

from zipformer_kernels import convert

SCRIPT = Path(sharded_models.__file__)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What `sharded_models` found: everything in one set of processes, for starting them takes longest."""
    file = tmp_path_factory.mktemp("sharded") / "results.pt"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return torch.load(file, weights_only=True)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_around_layers_and_their_parts(kind, mode, sharded):
    assert_alike(sharded[kind, mode, "ours"], sharded[kind, mode, "theirs"])


def cpu_offload(model, folder, accelerate):
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def disk_offload(model, folder, accelerate):
    accelerate.disk_offload(model, folder, execution_device="cpu", offload_buffers=True)


def pair(treat):
    """Upstream's model and ours, both treated."""
    made = {side: build(**CHUNKS) for side in SIDES}
    assert convert(made["ours"]).layers == (4, 4)
    for model in made.values():
        treat(model)
    return made


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_by_accelerate(offload, graded, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="not installed: pip install --no-deps accelerate==1.15.0")
    models = pair(lambda model: offload(model, str(tmp_path / str(id(model))), accelerate))
    assert all(next(model.parameters()).is_meta for model in models.values())
    seed_all(1)
    args = upstream_models.batch()
    with torch.set_grad_enabled(graded):
        ours, theirs = (models[side].eval()(*args)[0] for side in ("ours", "theirs"))
    assert_parity(ours, theirs, PARITY[torch.float64], "output")


def test_parts_that_compute_again():
    """A reentrant checkpoint runs its part without gradients first: what it returns must be tensors.

    In eval mode, for the second time Python's draws come out otherwise. (The other checkpoint finds fault with that in
    upstream's model.)
    """
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)

    def wrap(model):
        apply_activation_checkpointing(model, wrapper, check_fn=lambda module: type(module).__name__ in PARTS)

    found = {side: result(model, "differentiated") for side, model in pair(wrap).items()}
    assert_alike(found["ours"], found["theirs"])


def assert_alike(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_parity(ours[name], expected, PARITY[torch.float64], name)
