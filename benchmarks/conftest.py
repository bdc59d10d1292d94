"""How a benchmark of pytest-benchmark is run: one peer of one job of `benchmarks.harness`."""

import pytest

from benchmarks.harness import machine


@pytest.fixture
def time_job(benchmark):
    """Times one peer of a job with pytest-benchmark, after a check against the job's first peer."""

    def run(job, peer):
        prepared = job.prepare(tuple(dict.fromkeys((job.peers[0], peer))))
        if peer in prepared.skipped:
            pytest.skip(f"{peer}: {prepared.skipped[peer]}")
        assert not prepared.wrong
        assert not prepared.failed
        benchmark.group = job.title
        benchmark.extra_info |= {"bytes": job.bytes, "flops": job.flops, "device": machine.device_name()}

        def timed():
            result = prepared.runs[peer]()
            machine.synchronize()
            return result

        result = benchmark.pedantic(timed, rounds=job.rounds, warmup_rounds=min(1, job.rounds - 1))
        if isinstance(result, dict):  # a process that measured itself
            benchmark.extra_info |= result

    return run
