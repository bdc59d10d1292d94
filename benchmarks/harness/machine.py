"""The machine that is measured on: its name, and what a result depends on besides the code."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from zipformer_kernels.core import backend

ROOT = Path(__file__).parent.parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("torch", "triton", "numpy", "zipformer", "zipformer-kernels")
FEATURES = {"avx512f": "AVX-512", "amx_tile": "AMX"}  # of x86 processors, as Linux names them

ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # variables that change how memory is got


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def memory_bytes() -> int | None:
    """The memory of the device, in bytes; None where the system does not say."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_properties(DEVICE).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no such call, and not every system these names
        return None


def device_name() -> str:
    """The hardware: the GPU, or the processor with its vector extensions and the threads used."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    model, flags = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        entries = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        entries = {key.strip(): value for key, value in entries.items()}
        model, flags = entries.get("model name", model), entries.get("flags", "")
    model = " ".join(re.sub(r"\((R|TM)\)|\b(Processor|CPU|@.*)", " ", model).split())
    features = [name for flag, name in FEATURES.items() if flag in flags.split()]
    return ", ".join([model, *features, f"{torch.get_num_threads()} threads"])


def slug(name: str) -> str:
    """A name as the name of a folder: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, Any]:
    """What a result depends on besides the code, and the commit of the code, and whether files differ from it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "isa": backend.native.current_isa() if backend.native else None,
        "cuda": torch.version.cuda if DEVICE.type == "cuda" else None,
        "versions": versions,
        "allocator": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ALLOCATOR)},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _git(*command: str) -> str | None:
    """What git prints in the checkout; None outside of one."""
    if not (ROOT / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # a copy of the checkout, on a machine without git
        return None
    return result.stdout.strip() if result.returncode == 0 else None
