"""`pytest benchmarks -k swoosh` times this op: every case and every peer that runs here."""

BENCHMARKS = ("swoosh",)


def test_swoosh(time_job, job, peer):
    time_job(job, peer)
