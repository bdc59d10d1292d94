"""`pytest benchmarks -k scaled_adam` times this op: every case and every peer that runs here."""

BENCHMARKS = ("scaled_adam",)


def test_scaled_adam(time_job, job, peer):
    time_job(job, peer)
