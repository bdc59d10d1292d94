"""Builds the compiled module with its CUDA kernels for the emulator, once per checkout, and puts it in place."""

import fcntl
import functools
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from zipformer_kernels import backend

ROOT = Path(__file__).parent.parent


def build_module() -> ModuleType:
    """csrc/build.py, imported from the checkout."""
    spec = importlib.util.spec_from_file_location("zipformer_kernels_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def emulated_module() -> ModuleType:
    """The emulator's build of the compiled module."""
    work = ROOT / "build" / "emulator"
    work.mkdir(parents=True, exist_ok=True)
    output = work / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(work / "lock", "w") as lock:  # several test processes may want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_module().build(output, work, emulator=True)
    spec = importlib.util.spec_from_file_location("_emulated", output)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_emulated"] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Within the block the backend ``cuda`` runs in the emulator, on CPU tensors."""
    previous = backend.native
    backend.native = emulated_module()
    backend.refresh()
    try:
        yield
    finally:
        backend.native = previous
        backend.refresh()
