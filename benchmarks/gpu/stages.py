"""The stages of a run on a GPU machine: what each runs, for how long at most, and how much of it the summary shows."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
QUICK = 330  # seconds for all of "quick" once there are compiled kernels
ALL = 570  # and for anything else
MOST_CORES = 16  # a process for each holds half a gigabyte of the GPU's memory


def cores() -> int:
    """How many processes run at once."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, MOST_CORES)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as it is asked for, and as its files begin.
        seconds: the most it may take; then it is interrupted.
        command: its arguments; ``{out}`` stands for the folder of its files.
        shown: how many of its last lines the summary shows.
        variables: of its environment, besides those of the run.
        grace: seconds between the interrupt that ends it and the end by force.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    shown: int = 12
    variables: tuple[tuple[str, str], ...] = ()
    grace: float = 5


def _python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, *arguments


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return _python(str(HERE / name), *arguments)


def _model(name: str, seconds: int, shown: int) -> Stage:
    return Stage(name, seconds, _script("model.py", f"{{out}}/{name}.json", name), shown)


def _sanitizer(tool: str) -> Stage:
    """With torch's allocator nothing is freed, and what runs over the end of a tensor is not seen."""
    tool_command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
    command = (*tool_command, *_script("sanitize.py", "cuda", "triton"))
    return Stage(tool, 60, command, 6, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))


def _tests() -> tuple[str, ...]:
    workers = ("-n", str(cores()), "--dist", "loadgroup")
    return _python("-m", "pytest", "-q", *workers, "--gpu", "--junit-xml={out}/tests.xml", str(ROOT / "tests"))


NCU = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--log-file", "{out}/ncu.csv")
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "SchedulerStats")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("build", 120, _script("prepared.py", "use", "{prepared}"), 4),
        Stage("check", 80, _script("check.py", "{out}/check.json"), 60),
        _model("right", 80, 8),
        _model("train", 75, 26),
        _model("infer", 60, 30),
        Stage("table", 60, _script("table.py", "{out}/table.json", "--seconds", "55"), 120),
        _model("latency", 40, 8),
        _model("step", 60, 26),
        _model("adam", 25, 16),
        Stage("tests", 200, _tests(), 60, (("OMP_NUM_THREADS", "1"),), 20),
        *map(_sanitizer, ("memcheck", "racecheck", "initcheck", "synccheck")),
        Stage("sweep", 90, _script("sweep.py", "{out}/sweep.json"), 30),
        Stage("ncu", 90, (*NCU, *(f"--section={s}" for s in SECTIONS), *_script("once.py")), 4),
        Stage("bench", 570, _python("-m", "benchmarks.harness", "--no-compiled", "--output", "{out}/bench"), 40),
    )
}
"""In the order in which they are worth most."""

GROUPS = {
    "quick": ("build", "check", "right", "train", "infer", "table", "latency", "step", "adam"),
    "sanitize": ("memcheck", "racecheck", "initcheck", "synccheck"),
    "all": tuple(STAGES),
}


def expand(names: list[str]) -> list[Stage]:
    """The stages that names of stages and groups stand for, each once, in the order asked for.

    Raises:
        ValueError: there is no such stage.
    """
    found: dict[str, Stage] = {}
    for name in names:
        if name not in STAGES and name not in GROUPS:
            raise ValueError(f"wanted any of {', '.join((*GROUPS, *STAGES))}, got {name!r}")
        found |= {one: STAGES[one] for one in GROUPS.get(name, (name,))}
    return list(found.values())
