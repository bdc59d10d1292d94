"""Makes pytest collect ``bench_<op>.py``, and gives each benchmark its cases, directions and peers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness
import pytest
import torch


@pytest.fixture
def time_op(benchmark):
    """Times one peer of an op with pytest-benchmark; bytes, FLOPs and the device go into the report."""

    def run(op: str, case: object, direction: str, peer: str) -> None:
        found = {job.peer: job for job in harness.jobs(op, case, torch.float32, direction)}
        if peer not in found:
            pytest.skip(f"{op} has no {peer} here: {', '.join(found)} run on this machine")
        job = found[peer]
        benchmark.group = f"{op}, {case.name}, {direction}"
        benchmark.extra_info |= {"bytes": job.moved, "flops": job.flops, "device": harness.device_name()}
        benchmark.pedantic(lambda: (job.run(), harness.synchronize()), rounds=10, warmup_rounds=2)

    return run


def pytest_generate_tests(metafunc):
    if {"case", "direction", "peer"} <= set(metafunc.fixturenames):
        metafunc.parametrize("peer", ["eager", "compiled", "upstream", "cpu", "triton", "cuda"])
        metafunc.parametrize("direction", harness.DIRECTIONS)
        metafunc.parametrize("case", harness.cases_of(metafunc.module.OP), ids=lambda case: case.name)
