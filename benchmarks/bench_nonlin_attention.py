"""`pytest benchmarks -k nonlin_attention` times this op: every case and every peer that runs here."""

BENCHMARKS = ("nonlin_attention",)


def test_nonlin_attention(time_job, job, peer):
    time_job(job, peer)
