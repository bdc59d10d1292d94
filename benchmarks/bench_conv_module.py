"""`pytest benchmarks -k conv_module` times this op: every case and every peer that runs here."""

BENCHMARKS = ("conv_module",)


def test_conv_module(time_job, job, peer):
    time_job(job, peer)
