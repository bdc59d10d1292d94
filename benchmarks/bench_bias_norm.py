"""`pytest benchmarks -k bias_norm` times this op: every case and every peer that runs here."""

BENCHMARKS = ("bias_norm",)


def test_bias_norm(time_job, job, peer):
    time_job(job, peer)
