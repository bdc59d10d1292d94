"""Which backends exist, why one is missing, and which one a call asks for.

A call chooses its backend once, before the op runs, from the first of these that names one:

1. the argument ``backend=`` of the op,
2. the innermost ``with use_backend(name):``,
3. the environment variable ``ZIPFORMER_KERNELS_BACKEND``, read when this module is imported,
4. ``auto``: the first backend of `PREFERENCE` for the tensor's device that serves the call; ``eager`` always does.

Where a name is asked for, several may stand, separated by commas, in order of preference: ``cuda,triton,eager``. If
none of them can serve the call it raises `BackendError` with the reasons. ``auto`` never raises, and
`zipformer_kernels.explain` tells what was passed over and why.

The second and third way are meant for whole models, and few backends have kernels of every op. So an op that has none
on any backend they name runs on the first behind the last name in `PREFERENCE` that serves the call: under
``use_backend("cuda")`` attention runs on ``triton``. An op that has kernels there, but none for this call, raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch  # before the compiled module, so that both use one OpenMP runtime
from torch.compiler import is_compiling

BACKENDS = ("eager", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
BEHIND = {name: order[i + 1 :] for order in PREFERENCE.values() for i, name in enumerate(order)}
"""For each backend, those behind it in `PREFERENCE`."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


def check_request(request: str) -> str:
    """Returns `request` if it is ``auto`` or names of backends separated by commas; raises ValueError otherwise."""
    for name in request.split(","):
        if name not in BACKENDS and request != "auto":
            raise ValueError(f"backend must be one of {', '.join((*BACKENDS, 'auto'))}, got {name!r}")
    return request


@dataclass(eq=False)
class _Choice:
    """One ``with use_backend(request):`` that is not over."""

    request: str
    holds: bool = True


_default = check_request(os.environ.get("ZIPFORMER_KERNELS_BACKEND", "auto"))
_choices: ContextVar[tuple[_Choice, ...]] = ContextVar("choices of backends, the innermost last", default=())

_lock = threading.Lock()
_count = 0  # choices that hold, in all contexts
_latest: str | None = None  # what the context asks for that entered or left a block last; None while there is no block


@contextmanager
def use_backend(request: str) -> Iterator[None]:
    """Within the block every op runs on the backend asked for, or raises `BackendError` where it cannot.

    An op that has no kernels there at all runs on the next in `PREFERENCE`, so that a whole model runs by one name.

    The choice belongs to the context (`contextvars`): to this thread, or to this asyncio task and those that it starts.
    A block that ends takes its own choice away, whichever began last. A backward pass keeps the backend of its forward.
    Only torch.compile, which cannot see contexts, goes by the block that was entered or left last in any of them.

    Args:
        request: ``eager``, ``cpu``, ``triton``, ``cuda``, several of them separated by commas, or ``auto``.
    Raises:
        ValueError: `request` names something else.
    """
    choice = _Choice(check_request(request))
    token = _choices.set((*_choices.get(), choice))
    _note(1)
    try:
        yield
    finally:
        left = tuple(other for other in _choices.get() if other is not choice)
        try:
            _choices.reset(token)
        except ValueError:  # a generator is closed in another context than it began in, which still has the choice
            choice.holds = False
        else:
            _choices.set(left)
        _note(-1)


def _note(change: int) -> None:
    """Keeps what torch.compile sees up to date where the number of choices changes."""
    global _count, _latest
    with _lock:
        _count += change
        _latest = _innermost() if _count > 0 else None


def _innermost() -> str:
    """What the surrounding context asks for."""
    return next((choice.request for choice in reversed(_choices.get()) if choice.holds), _default)


def requested(argument: str | None = None) -> str:
    """What a call asks for: `argument` if given, else the surrounding choice; ``auto``, or names and commas."""
    if argument is not None:
        return check_request(argument)
    if _latest is None:  # as nearly always: nobody has chosen
        return _default
    return _latest if is_compiling() else _innermost()


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
        return "the compiled module was built without CUDA: `zipformer-kernels info` says why"
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
