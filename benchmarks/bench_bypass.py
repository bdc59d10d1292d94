"""`pytest benchmarks -k bypass` times this op: every case and every peer that runs here."""

BENCHMARKS = ("bypass",)


def test_bypass(time_job, job, peer):
    time_job(job, peer)
