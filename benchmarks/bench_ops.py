"""``pytest benchmarks/ -k swoosh`` times an op: its cases in each direction, by every peer that runs here.

``-k encoder`` times whole models, ``-k length`` long recordings, each in a fresh process for every peer: there the time
that pytest-benchmark reports is the process's, and ``extra_info`` has that of the recording and the peak memory.
"""

from collections.abc import Callable

import pytest

from benchmarks.harness import op_jobs, suite


def timed(*benchmarks: str) -> Callable[..., None]:
    """A test of all jobs and peers of these benchmarks."""

    def test(time_job, job, peer):
        time_job(job, peer)

    pairs = [(job, peer) for name in benchmarks for job in suite.jobs(name) for peer in job.peers]
    ids = [f"{job.title}, {peer}" for job, peer in pairs]
    return pytest.mark.parametrize(("job", "peer"), pairs, ids=ids)(test)


globals().update({f"test_{op}": timed(op) for op in op_jobs.names()})
test_shared_attention = timed("shared-attention")
test_rel_pos_attention = timed("rel-pos-attention")
test_scaled_adam = timed("scaled_adam")
test_encoder = timed(
    "conv-embed", "encoder-forward", "training-step", "streaming-chunk", "encoder-products", "conformer"
)
test_length = timed("length")
