"""Gives each ``bench_<name>.py`` its jobs and peers: those of `zipformer_kernels.bench`."""

import pytest

from zipformer_kernels.bench import machine, suite


@pytest.fixture
def time_job(benchmark):
    """Times one peer of a job with pytest-benchmark, after a check against the job's first peer."""

    def run(job, peer):
        prepared = job.prepare(tuple(dict.fromkeys((job.peers[0], peer))))
        if peer in prepared.skipped:
            pytest.skip(f"{peer}: {prepared.skipped[peer]}")
        assert not prepared.wrong
        benchmark.group = job.title
        benchmark.extra_info |= {"bytes": job.bytes, "flops": job.flops, "device": machine.device_name()}
        timed = prepared.runs[peer]
        benchmark.pedantic(lambda: (timed(), machine.synchronize()), rounds=job.rounds, warmup_rounds=1)

    return run


def pytest_generate_tests(metafunc):
    if {"job", "peer"} <= set(metafunc.fixturenames):
        pairs = [(job, peer) for name in metafunc.module.BENCHMARKS for job in suite.jobs(name) for peer in job.peers]
        metafunc.parametrize(("job", "peer"), pairs, ids=[f"{job.title}, {peer}" for job, peer in pairs])
