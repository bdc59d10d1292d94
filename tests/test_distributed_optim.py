"""ScaledAdam on two and on four processes equals one: DDP, FSDP2, hybrid, tensor parallel, checkpoints."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_optim import STEPS, Model, batch, optimizer_for, train

from zipformer_kernels import use_backend
from zipformer_kernels.core import backend

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")

TOLERANCE = 2e-6
SCRIPT = Path(__file__).parent / "distributed_optim.py"
BACKENDS = [name for name in ("eager", "cpu") if backend.missing[name] is None]


def run(kinds, folder, world_size):
    command = [sys.executable, str(SCRIPT), ",".join(kinds), str(folder), str(world_size)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs everything once: several kinds of training in each set of processes, for starting them takes longest."""
    folder = tmp_path_factory.mktemp("distributed")
    two = [f"{kind}-{name}" for kind in ("ddp", "fsdp", "tensor") for name in BACKENDS]
    run([*two, f"save-{BACKENDS[-1]}"], folder, 2)
    four = [f"{kind}-{BACKENDS[-1]}" for kind in ("fsdp", "hybrid", "resume")]
    run(four, folder, 4)
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def alone():
    model = Model()
    optimizer = optimizer_for(model)
    with use_backend("eager"):
        train(model, optimizer, range(STEPS))
    return model, optimizer.diagnostics()


KINDS = [
    *(f"{kind}-{name}-2" for kind in ("ddp", "fsdp", "tensor") for name in BACKENDS),
    *(f"{kind}-{BACKENDS[-1]}-4" for kind in ("fsdp", "hybrid", "resume")),
]


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_equal_one(kind, results, alone):
    model, diagnostics = alone
    if kind.startswith("tensor"):  # no process has a bad batch there
        model = Model()
        optimizer = optimizer_for(model)
        with use_backend("eager"):
            for step in range(STEPS):
                optimizer.zero_grad()
                x, y = batch(step)
                (model(x) - y).square().mean().backward()
                optimizer.step()
        diagnostics = optimizer.diagnostics()
    found = results[kind]
    for p, q in zip(found["params"], model.parameters(), strict=True):
        if q.numel():
            assert (p - q).abs().max() <= TOLERANCE * q.square().mean().sqrt()
    for ours, theirs in zip(found["diagnostics"], diagnostics, strict=True):
        for name, value in vars(theirs).items():
            if isinstance(value, float) and not math.isfinite(value):
                assert str(ours[name]) == str(value)
            elif name == "dominant_proportion":
                assert ours[name] == pytest.approx(value, rel=1e-4)
            else:
                assert ours[name] == (value if isinstance(value, str | int) else pytest.approx(value, rel=1e-5)), name


def test_the_run_skips_and_clips(alone):
    """So that the comparison means something."""
    model, diagnostics = alone
    assert [d.skipped for d in diagnostics] == [1, 1]
    assert all(d.threshold < math.inf for d in diagnostics)
    assert all((p - q).abs().max() > 0.01 for p, q in zip(model.parameters(), Model().parameters(), strict=True))
