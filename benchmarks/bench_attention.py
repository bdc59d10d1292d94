"""`pytest benchmarks -k attention` times this op: every case and every peer that runs here."""

BENCHMARKS = ("attention",)


def test_attention(time_job, job, peer):
    time_job(job, peer)
