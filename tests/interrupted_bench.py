"""A run of two benchmarks that never ends: ``python tests/interrupted_bench.py FOLDER``, for tests that end it.

``quick`` has a job that is done at once and one that sleeps, after it has written its process to ``FOLDER/asleep``.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import rates, suite
from benchmarks.harness.job import Job
from benchmarks.harness.peers import Prepared

FOLDER = Path(sys.argv[-1])
RATES = {"copy_bytes_per_s": 1e10, "matrix_flops_per_s": {"float32": 1e11}}


def sleep():
    (FOLDER / "asleep").write_text(str(os.getpid()))
    time.sleep(600)


def prepare(run, wanted):
    return Prepared(runs=dict.fromkeys(wanted, run))


def jobs(every):
    for case, run in (("done", time.time), ("asleep", sleep)):
        yield Job("quick", case, "both", torch.float32, ("a", "b"), partial(prepare, run), rounds=2, seconds=0.0)


suite.MODELS |= {"quick": jobs, "late": jobs}  # in the processes of its own too, which import this file
rates.measure = partial(dict, RATES)

if __name__ == "__main__":
    suite.run(suite.steps(["quick", "late"]), FOLDER, lambda step, found: None)
