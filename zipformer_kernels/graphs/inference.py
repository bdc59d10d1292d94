"""A model's forward pass as CUDA graphs, one for each form of its arguments."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_kernels.graphs.capture import (
    Cache,
    CudaGraphs,
    Graphs,
    Run,
    Watched,
    blamed,
    own_casts,
    surroundings,
)
from zipformer_kernels.graphs.structure import buffers_like, check_devices, fill, form, mapped, tensors_of


@dataclass
class _Captured:
    """One captured call: where it reads its arguments, and what repeats it."""

    buffers: list[Tensor]
    replay: Run


class Graphed:
    """What `graphed` returns: a model whose calls are replays of CUDA graphs.

    Attributes:
        model: the model.
        captures: how many captures there have been.
    """

    def __init__(self, model: nn.Module, cache: int, graphs: Graphs) -> None:
        self.model = model
        self.captures = 0
        self._graphs = graphs
        self._cache = Cache(cache)
        self._watched: Watched | None = None
        self._stream: Any = None
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these arguments: tensors in it are the caller's own."""
        device = self._device((args, kwargs))
        if not self._graphs.serves(device):
            if not self._warned:
                warnings.warn(f"nothing is captured on {device}: the model runs as it is", stacklevel=2)
                self._warned = True
            return self.model(*args, **kwargs)
        if self._watched is None or not self._watched.same():
            self.clear()
            self._watched = Watched(self.model)
        self._check((args, kwargs), self._watched, device)
        key = (form((args, kwargs)), *surroundings(device))
        self._follow_stream(device)
        captured = self._cache.get(key)
        if captured is None:
            captured = self._capture(args, kwargs)
            self._cache.put(key, captured)
        fill(captured.buffers, tensors_of((args, kwargs)))
        result = captured.replay()
        return mapped(Tensor.clone, result)

    def clear(self) -> None:
        """Drops all captures, and their memory."""
        self._cache.entries.clear()
        self._watched = None

    def _device(self, given: Any) -> torch.device:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return next((x.device for x in tensors_of(given)), torch.device("cpu"))

    @staticmethod
    def _check(given: Any, model: Watched, device: torch.device) -> None:
        if model.trains():
            raise RuntimeError("a model must be in eval mode to be graphed, got one in training mode; see GraphedStep")
        if torch.is_grad_enabled() and (model.needs_gradients() or any(x.requires_grad for x in tensors_of(given))):
            raise RuntimeError("a graphed model has no gradients: call it within torch.inference_mode() or no_grad()")
        check_devices(given, device)

    def _follow_stream(self, device: torch.device) -> None:
        """Lets this call begin behind the last one, where that was on another stream: they share buffers."""
        if device.type != "cuda":
            return
        current = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream != current:
            current.wait_stream(self._stream)
        self._stream = current

    def _capture(self, args: Any, kwargs: Any) -> _Captured:
        held_args, held_kwargs = buffers_like((args, kwargs))

        def run() -> Any:
            with torch.inference_mode(False), torch.no_grad(), own_casts():
                return self.model(*held_args, **held_kwargs)

        self._graphs.rehearse(run, strict=False)
        with blamed(self.model, "this call"):
            self._graphs.rehearse(run, strict=True)
            replay = self._graphs.record(run)
        self.captures += 1
        return _Captured(tensors_of((held_args, held_kwargs)), replay)


def graphed(model: nn.Module, cache: int = 8, *, graphs: Graphs | None = None) -> Graphed:
    """A model in eval mode whose calls are replays of CUDA graphs, so that no Python stands between its kernels.

    The first call with arguments of a form (shapes, dtypes, devices, and the values of what is no tensor), under an
    autocast and a choice of backend, runs the model on a side stream, captures it and replays it. Later calls copy
    their arguments into the capture's own, replay, and return copies of its results. Parameters that change in place
    are seen. Where a parameter, buffer or module is another one, or lies elsewhere (`.to()`,
    ``load_state_dict(assign=True)``), all is captured anew. Not seen is what else a forward reads: attributes such as
    ``chunk_size``, hooks, tuning. Call ``clear()`` after changing them.

    Captures share their memory, so calls must not run at the same time: not from several threads. One after the other
    they may come on any streams. On a CPU nothing is captured: the model runs as it is, and a warning says so once.

    Args:
        model: any model, all of it in eval mode, on one device.
        cache: how many captures are kept; the one used longest ago goes first. Pad batches to few lengths.
        graphs: what captures; by default ``torch.cuda.graph``.
    Raises:
        ValueError: `cache` is less than 1; in a call, a tensor is not on the model's device.
        RuntimeError: in a call, the model is in training mode, or gradients are wanted.
        CaptureError: in a call, the model does what no graph can hold, such as to read a number from the device. The
            message names the module and the line.
    """
    return Graphed(model, cache, CudaGraphs() if graphs is None else graphs)
