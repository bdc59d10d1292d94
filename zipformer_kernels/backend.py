"""Which backends exist, why one is missing, and which one a call gets.

A call chooses its backend once, before the op runs, from the first of these that names one:

1. the argument ``backend=`` of the op,
2. the innermost ``with use_backend(name):``,
3. the environment variable ``ZIPFORMER_KERNELS_BACKEND``, read when this module is imported,
4. ``auto``: the first backend in `PREFERENCE` that serves the call, and ``eager`` always does.

A backend that was asked for by name and cannot serve the call raises `BackendError` with the reason; ``auto``
passes on to the next one, and `explain` tells what it passed over and why.
"""

from __future__ import annotations

import functools
import importlib
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("eager", "cpu", "triton", "cuda")
PREFERENCE = ("cuda", "triton", "cpu", "eager")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


def check_name(name: str) -> str:
    """Returns `name` if it is a backend's name or ``auto``; raises ValueError otherwise."""
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend must be one of {', '.join((*BACKENDS, 'auto'))}, got {name!r}")
    return name


_requested = check_name(os.environ.get("ZIPFORMER_KERNELS_BACKEND", "auto"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op runs on backend `name`, or raises `BackendError` where it cannot.

    The choice holds for the process, not for one thread; backward passes keep the backend of their forward.

    Args:
        name: ``eager``, ``cpu``, ``triton``, ``cuda``, or ``auto``.
    Raises:
        ValueError: `name` is none of these.
    """
    global _requested
    previous = _requested
    _requested = check_name(name)
    try:
        yield
    finally:
        _requested = previous


def requested() -> str:
    """The backend that calls get without an argument: a name, or ``auto``."""
    return _requested


@functools.cache
def native() -> types.ModuleType | None:
    """The compiled module, or None where it was not built. torch is imported first: one OpenMP runtime."""
    try:
        return importlib.import_module("zipformer_kernels._native")
    except ModuleNotFoundError:
        return None


@functools.cache
def native_missing() -> str | None:
    """Why there is no compiled module, or None if there is one."""
    if native() is not None:
        return None
    return "the compiled module was not built: reinstall with a C++ compiler (ZIPFORMER_KERNELS_BUILD=auto)"


@functools.cache
def triton_missing() -> str | None:
    """Why Triton kernels cannot run in this process, or None if they can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton"
    if not (torch.cuda.is_available() or triton_interprets()):
        return "no GPU (TRITON_INTERPRET=1 runs Triton kernels on the CPU, for tests)"
    return None


def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def cuda_missing() -> str | None:
    """Why CUDA C++ kernels cannot run in this process, or None if they can."""
    if native() is None:
        return native_missing()
    if not native().build["cuda_targets"]:
        return "the compiled module was built without CUDA: reinstall where nvcc is on the PATH"
    if not native().emulated and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def unserved_device(backend: str, x: Tensor) -> str | None:
    """Why `backend` cannot run on the device of `x` in this process, or None if it can."""
    device = x.device.type
    if backend == "cpu":
        return native_missing() or (None if device == "cpu" else f"it takes CPU tensors, not {device}")
    if backend == "triton":
        wanted = "cpu" if triton_interprets() else "cuda"
        return triton_missing() or (None if device == wanted else f"it takes {wanted} tensors, not {device}")
    if backend == "cuda":
        if cuda_missing():
            return cuda_missing()
        wanted = "cpu" if native().emulated else "cuda"
        return None if device == wanted else f"it takes {wanted} tensors, not {device}"
    return None
