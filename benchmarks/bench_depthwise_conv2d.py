"""`pytest benchmarks -k depthwise_conv2d` times this op: every case and every peer that runs here."""

BENCHMARKS = ("depthwise_conv2d",)


def test_depthwise_conv2d(time_job, job, peer):
    time_job(job, peer)
