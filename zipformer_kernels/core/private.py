"""The private names of torch that this package uses: all of them, each with what stands in for it where torch has none.

What stands in is never less careful: a call that cannot be told from one that is watched runs on the reference, and
modules that may have hooks are called. Everything is looked up once, at import, so that it costs a call no more than
torch's own name would.

Two kinds of names with an underscore are not here: ``torch._foreach_*``, which are torch's operators on lists and have
no other name, and the attributes of an `nn.Module`, which a module's own subclasses may use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module


def private(path: str, instead: Any) -> Any:
    """What has a dotted name in torch, such as ``torch._C._is_tracing``, or `instead` where this torch has none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return instead


class Absent:
    """Stands in for a class that this torch has not: nothing is of it."""


def no() -> bool:
    """Stands in for a question that this torch cannot be asked, where the answer changes no result."""
    return False


def none_of(*_: Any) -> Sequence[Any]:
    """Stands in for a list that this torch does not have."""
    return ()


# ---- who looks on: `zipformer_kernels.core.call` ----

is_tracing: Callable[[], bool] = private("torch._C._is_tracing", torch.jit.is_tracing)
"""Whether torch.jit.trace, or an exporter by it, records calls."""

transforms_are_active: Callable[[], bool] = private("torch._C._are_functorch_transforms_active", no)
"""Whether a transform of torch.func is around the call. Without: its tensors have no memory, and so
take the reference."""

dual_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level", -1)
"""How many levels of forward-mode derivatives are open, less one. Without: dual tensors are not told from others."""

dispatch_modes: Callable[[], Sequence[Any]] = private(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack", none_of
)
"""The active TorchDispatchModes."""

count_dispatch_modes: Callable[[], int] = private("torch._C._len_torch_dispatch_stack", lambda: len(dispatch_modes()))
"""How many there are."""

_function_modes = private("torch.overrides._get_current_function_mode_stack", none_of)
count_function_modes: Callable[[], int] = private("torch._C._len_torch_function_stack", lambda: len(_function_modes()))
"""How many TorchFunctionModes are active."""

function_mode: Callable[[int], Any] = private("torch._C._get_function_stack_at", lambda i: _function_modes()[i])
"""The active TorchFunctionMode of a number, the outermost first."""

DeviceContext: type = private("torch.utils._device.DeviceContext", Absent)
"""The mode behind `torch.set_default_device`. Without: such a call is held for watched and takes the reference."""

FakeTensor: type = private("torch._subclasses.fake_tensor.FakeTensor", Absent)
"""Tensors of a FakeTensorMode. Without: torch raises its own error where their numbers are looked at."""


# ---- where launches go: `zipformer_kernels.core.launch` and `jit` ----

current_device: Callable[[], int] = private("torch._C._cuda_getDevice", torch.cuda.current_device)
"""The number of the current GPU, once CUDA has started."""

current_stream: Callable[[int], int] = private(
    "torch._C._cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
"""The address of the current stream of a GPU."""


# ---- backward passes: `zipformer_kernels.ops.attention` ----

will_execute: Callable[[Any], bool] = private("torch._C._will_engine_execute_node", None)
"""Whether the backward pass that runs comes to a node of the graph; None where torch cannot be asked."""

backward_pass: Callable[[], int] = private("torch._C._current_graph_task_id", None)
"""The number of the backward pass that runs; None where torch cannot be asked."""

knows_backward_passes = will_execute is not None and backward_pass is not None
"""Whether both can be asked."""


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls around which there is no transform of torch.func, as whoever calls it has asked.

    To ask once more takes half of a call's time. Without: ``function.apply`` itself.
    """
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


_top_hooks = private("torch._C._autograd._top_saved_tensors_default_hooks", None)


def saved_tensors_have_hooks() -> bool:
    """Whether what a Function saves now may come back as another tensor. Without: so it is held to be."""
    return _top_hooks is None or _top_hooks(False) is not None


# ---- hooks on every module: `zipformer_kernels.branch` ----


def _asks_for_global_hooks() -> Callable[[], bool]:
    try:
        tables = [
            getattr(nn_module, f"_global_{kind}_hooks")
            for kind in ("forward", "forward_pre", "backward", "backward_pre")
        ]
    except AttributeError:
        return private("torch.nn.modules.module._has_any_global_hook", lambda: True)
    forward, forward_pre, backward, backward_pre = tables
    return lambda: bool(forward or forward_pre or backward or backward_pre)


has_global_hooks: Callable[[], bool] = _asks_for_global_hooks()
"""Whether anyone looks on at every module. Without: so it is held to be, and every module is called."""


# ---- weights cast together: `zipformer_kernels.branch.nodes` ----


def _views(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    parts = flat.split([x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


views_like: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]] = private(
    "torch._C._nn.unflatten_dense_tensors", _views
)
"""Views of a flat tensor, one after another, with the shapes of others; ones of no elements may be flat. One call takes
a fifth of the time of a view each."""


# ---- recording and compiling ----

disable_dynamo: Callable[[Any], Any] = private("torch._disable_dynamo", torch.compiler.disable)
"""A decorator: torch.compile calls the function and does not look into it."""


def sizes_of_one_are_open() -> AbstractContextManager:
    """Within, torch.export takes 1 for a size like any other. Without: it refuses
    lengths that come down to one frame.
    """
    try:
        config = importlib.import_module("torch.fx.experimental._config")  # here, as it takes long to import
    except ImportError:
        return nullcontext()
    return config.patch(backed_size_oblivious=True) if hasattr(config, "backed_size_oblivious") else nullcontext()
