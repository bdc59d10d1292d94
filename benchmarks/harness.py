"""What every benchmark shares: the peers of an op, its cases on this machine, checks before timing, and timing.

A peer is one way to compute an op: each backend that runs here (interpreters and emulators do not count), the eager
reference, the reference under `torch.compile`, and upstream's code where it has the same op.
"""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels import backend, ops
from zipformer_kernels.ops.cases import Case

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DIRECTIONS = ("forward", "backward", "both")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU_LIMITS = {"bytes": 400e6, "flops": 4e10}  # beyond that a case takes too long on a CPU


@dataclass(frozen=True)
class Job:
    """One thing to time: a peer of an op on a case in a direction, as a function without arguments."""

    op: str
    case: Case
    dtype: torch.dtype
    direction: str
    peer: str
    run: Callable[[], Any]

    @property
    def moved(self) -> int:
        """The fewest bytes that must pass through memory."""
        sizes = self.case.bytes(self.dtype.itemsize)
        return sum(sizes.values()) if self.direction == "both" else sizes[self.direction]

    @property
    def flops(self) -> int:
        """Floating-point operations of the op."""
        return sum(self.case.flops.values()) if self.direction == "both" else self.case.flops[self.direction]


def cases_of(op: str) -> list[Case]:
    """The large cases of an op that this machine can time."""
    cases = [case for case in importlib.import_module(f"zipformer_kernels.ops.{op}.cases").CASES if case.large]
    if DEVICE.type == "cuda":
        return cases
    return [
        case
        for case in cases
        if sum(case.bytes(4).values()) <= CPU_LIMITS["bytes"] and sum(case.flops.values()) <= CPU_LIMITS["flops"]
    ]


def upstream_peer(op: str) -> Callable[..., Tensor] | None:
    """The same computation in upstream's code on an op's arguments, or None where it has no function for it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import upstream

    scaling = upstream.scaling
    if op == "swoosh":
        functions = {"l": scaling._swooshl, "r": scaling._swooshr}
        return lambda x, kind: functions[kind](x)
    if op == "bias_norm":
        return lambda x, bias, log_scale: scaling.BiasNormFunction.apply(x, bias, log_scale, -1, False)
    return None


def peers_of(op: str, args: tuple[Any, ...]) -> dict[str, Callable[..., Tensor]]:
    """Every way to compute an op on these arguments on this machine, by name."""
    operation = ops.get(op)
    peers: dict[str, Callable[..., Tensor]] = {}
    for name in operation.backends:
        stands_in = (name == "triton" and backend.TRITON_INTERPRETS) or (name == "cuda" and backend.emulated())
        if not stands_in and operation.unsupported(name, *args) is None:
            peers[name] = lambda *a, name=name: operation(*a, backend=name)
    peers["compiled"] = torch.compile(operation.reference)
    try:
        theirs = upstream_peer(op)
    except ImportError:
        theirs = None  # upstream is a test dependency: where it is missing its column is
    if theirs is not None:
        peers["upstream"] = theirs
    return peers


def first(results: Any) -> Tensor:
    """The first output of an op."""
    return results if isinstance(results, Tensor) else results[0]


def check(op: str, case: Case, dtype: torch.dtype, peers: dict[str, Callable[..., Tensor]], args: tuple) -> None:
    """Every peer agrees with the eager one, or AssertionError: what is wrong is not timed."""
    with torch.no_grad():
        expected = first(peers["eager"](*args)).double()
        for name, peer in peers.items():
            error = ((first(peer(*args)).double() - expected).norm() / expected.norm()).item()
            assert error < 50 * torch.finfo(dtype).eps, f"{op}, {case.name}: {name} is off by {error:.1e}"


def jobs(op: str, case: Case, dtype: torch.dtype, direction: str) -> list[Job]:
    """One job per peer, on the same inputs, checked."""
    torch.manual_seed(0)
    args = case.inputs(dtype, DEVICE)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    peers = peers_of(op, args)
    check(op, case, dtype, peers, args)

    def job(name: str, peer: Callable[..., Tensor]) -> Job:
        def forward() -> Any:
            with torch.no_grad():
                return peer(*args)

        def both() -> Any:
            return torch.autograd.grad(first(peer(*args)), leaves, grad)

        out = first(peer(*args))
        grad = torch.randn_like(out)

        def backward() -> Any:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        run = {"forward": forward, "backward": backward, "both": both}[direction]
        return Job(op, case, dtype, direction, name, run)

    return [job(name, peer) for name, peer in peers.items()]


def interleaved(runs: dict[str, Callable[[], Any]], seconds: float = 2.0, least: int = 7) -> dict[str, list[float]]:
    """Samples in seconds for each function, taken in turns so that all see the same machine."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    start = time.perf_counter()
    while len(next(iter(samples.values()))) < least or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            synchronize()
            begin = time.perf_counter()
            run()
            synchronize()
            samples[name].append(time.perf_counter() - begin)
    return samples


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def copy_rate(size: int = 256 << 20) -> float:
    """Bytes per second of a copy, read and written, from memory to memory."""
    source = torch.ones(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    samples = interleaved({"copy": lambda: target.copy_(source)}, seconds=0.5)["copy"]
    return 2 * size / statistics.median(samples)


def device_name() -> str:
    """The machine by its hardware."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A name as a folder's name."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)


def environment() -> dict[str, Any]:
    """What a result depends on besides the code."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": None if backend.native is None else backend.native.current_isa(),
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
    }
