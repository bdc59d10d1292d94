"""Which backends exist, why one is missing, and which one a call asks for.

A call chooses its backend once, before the op runs, from the first of these that names one:

1. the argument ``backend=`` of the op,
2. the innermost ``with use_backend(name):``,
3. the environment variable ``ZIPFORMER_KERNELS_BACKEND``, read when this module is imported,
4. ``auto``: the first backend of `PREFERENCE` for the tensor's device that serves the call; ``eager`` always does.

Where a name is asked for, several may stand, separated by commas, in order of preference: ``cuda,triton,eager``. If
none of them can serve the call it raises `BackendError` with the reasons. ``auto`` never raises, and
`zipformer_kernels.explain` tells what was passed over and why.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch  # before the compiled module, so that both use one OpenMP runtime

BACKENDS = ("eager", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


def check_request(request: str) -> str:
    """Returns `request` if it is ``auto`` or names of backends separated by commas; raises ValueError otherwise."""
    for name in request.split(","):
        if name not in BACKENDS and request != "auto":
            raise ValueError(f"backend must be one of {', '.join((*BACKENDS, 'auto'))}, got {name!r}")
    return request


_requested = check_request(os.environ.get("ZIPFORMER_KERNELS_BACKEND", "auto"))


@contextmanager
def use_backend(request: str) -> Iterator[None]:
    """Within the block every op runs on the backend asked for, or raises `BackendError` where it cannot.

    The choice holds for the whole process, not for one thread. A backward pass keeps the backend of its forward.

    Args:
        request: ``eager``, ``cpu``, ``triton``, ``cuda``, several of them separated by commas, or ``auto``.
    Raises:
        ValueError: `request` names something else.
    """
    global _requested
    previous = _requested
    _requested = check_request(request)
    try:
        yield
    finally:
        _requested = previous


def requested(argument: str | None = None) -> str:
    """What a call asks for: `argument` if given, else the surrounding choice; ``auto``, or names and commas."""
    return _requested if argument is None else check_request(argument)


TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton kernels run in Triton's interpreter, on CPU tensors. Only for tests: ``auto`` never chooses it."""


native: types.ModuleType | None = None
"""The compiled module, or None where there is none. Tests put the emulator's build here."""

_native_error = "the compiled module was not built: reinstall with a C++ compiler on the PATH"
try:
    native = importlib.import_module("zipformer_kernels._native")
except ModuleNotFoundError:
    pass
except ImportError as error:  # built for another Python, C library or processor
    _native_error = f"the compiled module cannot be loaded ({error}): reinstall to build it here"


def emulated() -> bool:
    """Whether the compiled module runs its CUDA kernels in the emulator, on CPU tensors."""
    return native is not None and native.build["emulated"]


def _missing(name: str) -> str | None:
    if name in ("cpu", "cuda") and native is None:
        return _native_error
    if name == "cuda" and not native.build["cuda_targets"]:
        return "the compiled module was built without CUDA: reinstall with nvcc on the PATH"
    if name == "cuda" and not emulated() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if name == "triton" and not TRITON_INTERPRETS and not torch.cuda.is_available():
        return "torch sees no CUDA device (with TRITON_INTERPRET=1 the kernels run interpreted on the CPU)"
    return None


missing: dict[str, str | None] = {}
"""For each backend, why it cannot run in this process at all, or None if it can."""

serving: dict[str, tuple[str, ...]] = {}
"""For each type of device, the backends of `PREFERENCE` that run on its tensors in this process, in that order."""


def refresh() -> None:
    """Fills `missing` and `serving`. Called at import, and by tests that put another compiled module in place."""
    for name in BACKENDS:
        missing[name] = _missing(name)
    for device, order in PREFERENCE.items():
        serving[device] = tuple(name for name in order if unserved_device(name, device) is None)


def unserved_device(name: str, device: str) -> str | None:
    """Why backend `name` cannot run on tensors of a device type in this process, or None if it can."""
    if missing[name] is not None or name == "eager":
        return missing[name]
    stands_in = TRITON_INTERPRETS if name == "triton" else emulated()
    wanted = "cpu" if name == "cpu" or stands_in else "cuda"
    return None if device == wanted else f"it takes {wanted} tensors, got one on {device}"


refresh()
