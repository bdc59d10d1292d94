"""One long recording, offline: time and peak memory of the whole process against length.

Each point is a fresh process, ``python -m benchmarks.harness.length PEER MINUTES``, that runs conv embed and
encoder of preset S on random features once after a warm-up, and prints its time and the most memory it ever held. The
warm-up is short, but what is compiled is compiled for the very length in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import models
from benchmarks.harness.job import Job, Measured, complete, figures
from benchmarks.harness.machine import DEVICE, ROOT, synchronize
from benchmarks.harness.peers import Prepared, attempt
from benchmarks.harness.process import Failed, ending
from zipformer_kernels.presets import FBANK_BINS

PRESET = "S"
MINUTES = {  # upstream stops where a little more would take 8 GB
    "upstream": (0.5, 1.0, 2.0, 3.0),
    "upstream compiled": (0.5, 3.0),
    "ours": (0.5, 1.0, 2.0, 3.0, 7.0, 14.0),
}
EVERY_MINUTES = {"upstream": (), "upstream compiled": (1.0, 2.0), "ours": (30.0, 60.0)}
WARM_UP_MINUTES = 0.25


@dataclass(frozen=True)
class LengthJob(Job):
    """One length by all peers that take it. What it prepares are fresh processes, which time themselves."""

    minutes: float = 0.0

    def measured(self, rates: dict[str, Any], peers: Sequence[str]) -> Measured:
        prepared = self.prepare(peers)
        found = Measured(skipped=self.reasons(prepared.skipped))
        for peer, run in prepared.runs.items():
            point, reason = attempt(run)
            if reason is not None:
                found.failed += self.reasons({peer: reason})
                continue
            numbers = figures([point["seconds"]], None, None, self.key["dtype"], rates)
            usage = {"peak_bytes": point["peak_bytes"], "launches": None, "minutes": self.minutes}
            found.rows.append({**self.key, "peer": peer, **numbers, **usage, "times_as_long": {}})
        complete(found.rows)
        return found


def jobs(every: bool = False) -> Iterator[Job]:
    """One for each length, shortest first."""
    taken = {peer: {*MINUTES[peer], *(EVERY_MINUTES[peer] if every else ())} for peer in MINUTES}
    for minutes in sorted(set().union(*taken.values())):
        peers = tuple(peer for peer in taken if minutes in taken[peer])
        case = f"{PRESET}, 1 x {minutes:g} min"
        yield LengthJob(
            *("length", case, "forward", torch.float32, peers), partial(_prepare, minutes), rounds=1, minutes=minutes
        )


def _prepare(minutes: float, wanted: Sequence[str]) -> Prepared:
    reasons = {peer: models.unserved(peer) for peer in wanted}
    return Prepared(
        runs={peer: partial(in_fresh_process, peer, minutes) for peer in wanted if reasons[peer] is None},
        skipped={peer: reason for peer, reason in reasons.items() if reason is not None},
    )


def in_fresh_process(peer: str, minutes: float) -> dict[str, float]:
    """Seconds and peak memory in bytes of one recording. Raises `Failed` with the last line of what failed."""
    command = [sys.executable, "-m", __spec__.name, peer, str(minutes)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = ending(result.returncode) if result.returncode < 0 else (result.stderr.splitlines() or [""])[-1]
        raise Failed(f"{peer} on {minutes:g} minutes failed: {reason}")
    return json.loads(result.stdout.splitlines()[-1])


def peak_memory() -> int:
    """The most memory that this process ever held, or that tensors took on a GPU, in bytes."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage also counts what the parent held when it started this process
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Runs one peer on one length and prints what it took."""
    peer, minutes = sys.argv[1], float(sys.argv[2])
    module = models.model(peer, PRESET).to(DEVICE).eval()
    compiles = peer == "upstream compiled"
    run = torch.compile(module) if compiles else module
    for length in (minutes if compiles else WARM_UP_MINUTES, minutes):
        features = torch.randn(1, int(length * 60 * models.FEATURES_PER_SECOND), FBANK_BINS, device=DEVICE)
        start = time.perf_counter()
        with torch.no_grad():
            run(features)
        synchronize()
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory()}))


if __name__ == "__main__":
    main()
