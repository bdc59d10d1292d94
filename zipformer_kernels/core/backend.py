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
``use_backend("cuda")`` ``depthwise_conv2d`` runs on ``eager``. An op that has kernels there, but none for this call,
raises. So does every op where one of those backends is missing in this process and no other serves: nothing is passed
over in silence. The first way, an argument, asks one op, which raises in all of these cases.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch  # before the compiled module, so that both use one OpenMP runtime
from torch.compiler import is_compiling


@dataclass(frozen=True)
class Backend:
    """A way to run ops.

    Attributes:
        name: as a call asks for it.
        devices: ``()`` -> the types of devices whose tensors it takes in this process; None if it takes all.
        why_missing: ``()`` -> why it cannot run in this process at all, or None if it can.
        preferred: its place among the backends of ``auto`` for each type of device: those with lower numbers come
            first. ``auto`` never chooses it on other devices.
    """

    name: str
    devices: Callable[[], Collection[str]] | None
    why_missing: Callable[[], str | None]
    preferred: Mapping[str, int]


registry: dict[str, Backend] = {}
"""All backends by name, in the order in which they were registered."""

BACKENDS: tuple[str, ...] = ()
"""Their names."""

PREFERENCE: dict[str, tuple[str, ...]] = {}
"""For each type of device, the backends among which ``auto`` chooses, in that order."""

BEHIND: dict[str, tuple[str, ...]] = {}
"""For each backend, those behind it in `PREFERENCE`."""


def register(backend: Backend) -> None:
    """Adds a backend, which `Op.add_backend` gives launchers of an op to. From then on it can be asked for by name.

    Raises:
        ValueError: there is one of this name, or the name cannot be asked for.
    """
    if backend.name in registry:
        raise ValueError(f"there is a backend {backend.name!r} already")
    if backend.name == "auto" or "," in backend.name or not backend.name:
        raise ValueError(f"a backend's name must not be 'auto', empty, or have a comma, got {backend.name!r}")
    registry[backend.name] = backend
    refresh()


def unregister(name: str) -> None:
    """Takes a backend away that `register` added."""
    del registry[name], missing[name]
    refresh()


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


_default = "auto"  # until the backends are registered, at the end of this file
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


def as_in(request: str) -> AbstractContextManager[None]:
    """`use_backend` of what a forward pass was asked for, for its backward pass; nothing where that is asked for."""
    return nullcontext() if requested() == request else use_backend(request)


def asked_for(argument: str | None, request: str, offered: Collection[str]) -> tuple[str, ...]:
    """The names among which a call chooses that does not ask for ``auto``, in order.

    Args:
        argument: as of `requested`, and `request` what that said.
        offered: the backends that the op has kernels on.
    """
    names = tuple(request.split(","))
    if argument is not None or any(name in offered or missing[name] for name in names):
        return names
    return (*names, *BEHIND[names[-1]])


def candidates(device: str, offered: Collection[str]) -> tuple[str, ...]:
    """The backends among which a call on a device chooses, in order, whether or not they serve it.

    Args:
        device: the type of the device.
        offered: the backends that the op has kernels on.
    """
    request = requested()
    return serving.get(device, ()) if request == "auto" else asked_for(None, request, offered)


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


def _no_native() -> str | None:
    return _native_error if native is None else None


def _no_cuda() -> str | None:
    if native is None:
        return _native_error
    if not native.build["cuda_targets"]:
        return "the compiled module was built without CUDA: `zipformer-kernels info` says why"
    if not emulated() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not TRITON_INTERPRETS and not torch.cuda.is_available():
        return "torch sees no CUDA device (with TRITON_INTERPRET=1 the kernels run interpreted on the CPU)"
    return None


missing: dict[str, str | None] = {}
"""For each backend, why it cannot run in this process at all, or None if it can."""

serving: dict[str, tuple[str, ...]] = {}
"""For each type of device, the backends of `PREFERENCE` that run on its tensors in this process, in that order."""


def refresh() -> None:
    """Fills what is derived of the registry. Called by `register`, and by tests that put another module in place."""
    global BACKENDS
    BACKENDS = tuple(registry)
    devices = dict.fromkeys(device for backend in registry.values() for device in backend.preferred)
    PREFERENCE.clear()
    BEHIND.clear()
    for device in devices:
        chosen = [backend for backend in registry.values() if device in backend.preferred]
        PREFERENCE[device] = tuple(b.name for b in sorted(chosen, key=lambda b: b.preferred[device]))
    for name in BACKENDS:
        missing[name] = registry[name].why_missing()
        orders = [order for order in PREFERENCE.values() if name in order]
        BEHIND[name] = orders[-1][orders[-1].index(name) + 1 :] if orders else ("eager",)
    serving.clear()
    for device, order in PREFERENCE.items():
        serving[device] = tuple(name for name in order if unserved_device(name, device) is None)


def unserved_device(name: str, device: str) -> str | None:
    """Why backend `name` cannot run on tensors of a device type in this process, or None if it can."""
    if missing[name] is not None or registry[name].devices is None:
        return missing[name]
    taken = registry[name].devices()
    return None if device in taken else f"it takes {' or '.join(taken)} tensors, got one on {device}"


# Numbers leave room for others between.
register(Backend("eager", None, lambda: None, {"cpu": 1000, "cuda": 1000}))
register(Backend("cpu", lambda: ("cpu",), _no_native, {"cpu": 100}))
register(Backend("triton", lambda: ("cpu" if TRITON_INTERPRETS else "cuda",), _no_triton, {"cuda": 200}))
register(Backend("cuda", lambda: ("cpu" if emulated() else "cuda",), _no_cuda, {"cuda": 100}))

_default = check_request(os.environ.get("ZIPFORMER_KERNELS_BACKEND", "auto"))
