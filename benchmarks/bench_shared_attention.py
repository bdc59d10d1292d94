"""`pytest benchmarks -k shared_attention` times all uses of a layer's attention weights, by every peer."""

BENCHMARKS = ("shared-attention",)


def test_shared_attention(time_job, job, peer):
    time_job(job, peer)
