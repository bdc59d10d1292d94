"""`pytest benchmarks -k swoosh_linear` times this op: every case and every peer that runs here."""

BENCHMARKS = ("swoosh_linear",)


def test_swoosh_linear(time_job, job, peer):
    time_job(job, peer)
