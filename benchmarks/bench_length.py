"""`pytest benchmarks -k length` runs one recording of each length in a fresh process for every peer that runs here.

The time that pytest-benchmark reports is the process's; ``extra_info`` has that of the recording, and the peak memory.
"""

BENCHMARKS = ("length",)


def test_length(time_job, job, peer):
    time_job(job, peer)
