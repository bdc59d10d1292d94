"""What both kinds of graphs share: how a function is captured, what a capture depends on, and what stopped one."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zipformer_kernels.core import backend

Run = Callable[[], Any]

_training, _requires_grad = attrgetter("training"), attrgetter("requires_grad")


class CaptureError(RuntimeError):
    """Something cannot be captured; the message says which module it happened in, and where."""


class Graphs(Protocol):
    """What captures functions and repeats them. `CudaGraphs` is the one for GPUs; tests have another."""

    def serves(self, device: torch.device) -> bool:
        """Whether functions on a device can be captured."""

    def rehearse(self, run: Run, strict: bool) -> Any:
        """Runs the function once, away from the current stream, and returns what it returned. What compiles, measures
        or allocates at a first call has then done so. If `strict`, raises where the host would wait for the device.
        """

    def record(self, run: Run) -> Run:
        """Captures the function; each call of what comes back repeats its kernels, and returns the same tensors."""


class CudaGraphs:
    """Captures by ``torch.cuda.graph``. All captures share one pool of memory, so they must run one after the other."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._streams: dict[int, torch.cuda.Stream] = {}

    def serves(self, device: torch.device) -> bool:
        """Whether functions on a device can be captured."""
        return device.type == "cuda"

    def rehearse(self, run: Run, strict: bool) -> Any:
        """Runs the function on a side stream, between the work before and after on the current one."""
        stream, current = self._stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        previous = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error" if strict else previous)
        try:
            with torch.cuda.stream(stream):
                return run()
        finally:
            torch.cuda.set_sync_debug_mode(previous)
            current.wait_stream(stream)

    def record(self, run: Run) -> Run:
        """Captures the function on a side stream. Other threads may go on to use the device."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream(), capture_error_mode="thread_local"):
            result = run()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def _stream(self) -> torch.cuda.Stream:
        device = torch.cuda.current_device()
        return self._streams.setdefault(device, torch.cuda.Stream(device))


class Cache:
    """Captures by what they depend on; of more than `size` the one used longest ago goes."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"cache must be at least 1, got {size}")
        self.size = size
        self.entries: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """What is kept for a key, which is now the last used; or None."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key]

    def put(self, key: Hashable, entry: Any) -> None:
        """Keeps something, in place of the least recently used if need be."""
        self.entries[key] = entry
        self.entries.move_to_end(key)
        while len(self.entries) > self.size:
            self.entries.popitem(last=False)


class Watched:
    """A model as a capture has seen it: its modules, and the tensors whose addresses the kernels were given.

    Numbers that change in place are no change. Another tensor, another memory or another module is one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._tables = [t for m in self._modules for t in (m._parameters, m._buffers, m._modules)]
        self._values = self._values_now()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._places = list(map(Tensor.data_ptr, self._tensors))

    def same(self) -> bool:
        """Whether the model is as it was."""
        values = self._values_now()
        if len(values) != len(self._values) or not all(map(is_, values, self._values)):
            return False
        return list(map(Tensor.data_ptr, self._tensors)) == self._places

    def trains(self) -> bool:
        """Whether a module is in training mode."""
        return any(map(_training, self._modules))

    def needs_gradients(self) -> bool:
        """Whether a parameter does."""
        return any(map(_requires_grad, self._tensors))

    def _values_now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))


def surroundings(device: torch.device) -> tuple[Hashable, ...]:
    """What of a call's surroundings its kernels depend on: autocast, and the backend that is asked for."""
    cast = torch.is_autocast_enabled(device.type)
    return cast, torch.get_autocast_dtype(device.type) if cast else None, backend.requested()


@contextmanager
def own_casts() -> Iterator[None]:
    """Within, autocast casts weights anew: a cast from before a capture would not be repeated, one of a capture's
    memory must not be used after it.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def blamed(model: nn.Module, what: str) -> Iterator[None]:
    """Turns an error within into a `CaptureError` that names the module and the line it comes from."""
    try:
        yield
    except Exception as error:
        raise CaptureError(f"{what} cannot be captured: {blame(error, model)}") from error


def blame(error: BaseException, model: nn.Module) -> str:
    """What went wrong, in the innermost module of the model that was being run, and on which line."""
    while error.__context__ is not None and _ends_capture(error):
        error = error.__context__
    names = {id(module): name or "the model itself" for name, module in model.named_modules()}
    where = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if id(module) in names:
            where = f" in {names[id(module)]} ({type(module).__name__})"
    lines = traceback.extract_tb(error.__traceback__)
    at = f", {lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}" if lines else ""
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}{where}{at}"


def _ends_capture(error: BaseException) -> bool:
    """Whether it is the error that a failed capture ends in, which tells less than the one before it."""
    lines = traceback.extract_tb(error.__traceback__)
    return bool(lines) and lines[-1].filename == torch.cuda.graphs.__file__
