"""What is asked once a call: who looks on, and whether kernels may read the tensors' memory.

Kernels take raw addresses, and fused ways leave out calls. Both are right only for plain tensors that nobody looks at:
a subclass may hold its numbers in another form, a mode may want to see or to change every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from zipformer_kernels.core.private import (
    DeviceContext,
    FakeTensor,
    count_dispatch_modes,
    count_function_modes,
    dual_level,
    function_mode,
    is_tracing,
    transforms_are_active,
)

_is_exporting = getattr(torch.compiler, "is_exporting", is_compiling)  # since torch 2.7

WATCHERS = {
    "transform": "it cannot be transformed by torch.func (vmap, grad, jvp, ...); only eager can",
    "tangents": "it has no forward-mode derivative; only eager has",
    "mode": "a TorchDispatchMode or TorchFunctionMode is active, which would not see what it does; only eager shows it",
}
"""Why no kernel can serve a call, by who takes it apart. (Exporters and torch.compile record operators.)"""

LOWEST = 1 << 32
"""No heap of a process of 64 bits, or hardly any, has an address below this: one that does is looked into."""

PLAIN = frozenset({Tensor, nn.Parameter})
"""The classes of tensors whose numbers stand in memory as torch's own do; subclasses may hold them otherwise."""


def watcher() -> str | None:
    """Who takes calls apart, rather than to run them.

    Returns:
        "export" where a program is recorded to run elsewhere (torch.export, torch.jit.trace, an ONNX exporter),
        "compile" under torch.compile, "transform" under a transform of torch.func (vmap, grad, jvp, ...), "tangents"
        inside ``torch.autograd.forward_ad.dual_level()``, "mode" under a TorchDispatchMode (FakeTensorMode,
        FlopCounterMode, ...) or a TorchFunctionMode other than a default device; or None.
    """
    if is_compiling():  # so it is while torch.export records, too
        return "export" if _is_exporting() else "compile"
    if is_tracing():
        return "export"
    if transforms_are_active():
        return "transform"
    if dual_level() >= 0:
        return "tangents"
    if count_dispatch_modes() or (count_function_modes() and _wants_to_see_functions()):
        return "mode"
    return None


def being_traced() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or an ONNX exporter records the call.

    What is recorded runs again: on other sizes, and with no new draw of Python's ``random``. So in eval mode modules
    draw nothing while they are recorded, and sizes stay variables (`zipformer_kernels.ops.sizes`).
    """
    return is_compiling() or is_tracing()


def exports_calls() -> bool:
    """Whether torch.export runs the call to record it, rather than to read its instructions (``strict=True``)."""
    return is_compiling() and not is_dynamo_compiling() and _is_exporting()


def _wants_to_see_functions() -> bool:
    """Whether a TorchFunctionMode is active that is more than `torch.set_default_device`."""
    return any(type(mode) is not DeviceContext for mode in map(function_mode, range(count_function_modes())))


def barred(tensors: Sequence[Tensor | None], watched_by: str | None) -> str | None:
    """Why no kernel may serve a call, whatever it takes, so that the reference must; or None.

    Exporters and torch.compile bar none: they record operators.

    Args:
        tensors: those of the call.
        watched_by: as `watcher` has it.
    """
    return unreadable(tensors) if watched_by is None else WATCHERS.get(watched_by)


def plain(*tensors: Tensor | None) -> bool:
    """Whether nobody looks on and kernels may read the memory of all these tensors; see `unreadable`.

    It costs 0.2 microseconds, and as much for each tensor.
    """
    return watcher() is None and unreadable(tensors) is None


def unreadable(tensors: Sequence[Tensor | None]) -> str | None:
    """Why kernels must not read the memory of these tensors, or None if they may.

    They may where each tensor is None, or exactly a `torch.Tensor` or `torch.nn.Parameter`, strided, with memory of its
    own in which its numbers stand as they are (not those of their negatives), and all are on one device.
    """
    device = None
    try:
        for x in tensors:
            if x is None:
                continue
            if x.__class__ not in PLAIN or x.data_ptr() < LOWEST or x.is_neg():
                break
            if device is None:
                device = x.device
            elif device != x.device:
                break
        else:
            return None
    except RuntimeError:  # torch raises it for every tensor without memory; `_why` asks again, and tells
        pass
    device = None
    for x in tensors:
        if x is None:
            continue
        reason = _why(x)
        if reason is None and device is not None and x.device != device:
            reason = f"tensors on {device} and {x.device}"
        if reason is not None:
            return f"it reads memory and takes plain tensors of one device, got {reason}"
        device = x.device
    return None


def has_values(x: Tensor) -> bool:
    """Whether x has numbers that can be looked at: not on device ``meta``, nor under a FakeTensorMode."""
    return not x.is_meta and not isinstance(x, FakeTensor)


def _why(x: Tensor) -> str | None:
    """Why kernels must not read the memory of x."""
    if type(x) not in PLAIN:
        return f"a {type(x).__module__}.{type(x).__qualname__}"
    if x.layout is not torch.strided or x.is_nested:
        return f"a nested tensor or one of layout {x.layout}"
    try:
        address = x.data_ptr()
    except RuntimeError as error:
        return f"one without memory: {str(error).splitlines()[0]}"
    if x.is_neg():
        return "one that stands for its negative: call its resolve_neg()"
    if x.numel() > 0 and (address == 0 or not _covered(x)):
        return f"one without memory of its own, on {x.device}"
    return None


def _covered(x: Tensor) -> bool:
    """Whether all elements of x, which has some, lie in its storage."""
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.untyped_storage().nbytes() >= (last + 1) * x.element_size()


# Asked once: torch.compile before 2.8 cannot record the question.
_WITHOUT_AUTOCAST = frozenset(
    device
    for device in ("meta", "lazy", "vulkan", "opengl", "maia", "fpga", "ve")
    if not torch.amp.is_autocast_available(device)
)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes products in on the device of x, or None where it is off."""
    device = x.device.type
    if device in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(launch: Callable[..., Any], *args: Any) -> Any:
    """Launchers state their dtypes; torch functions inside them must not cast once more."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            break
    else:
        return launch(*args)
    if is_compiling():
        with torch.autocast(device, enabled=False):
            return launch(*args)
    torch.set_autocast_enabled(device, False)  # as the context does, of which the compiler knows; that takes 3 us
    try:
        return launch(*args)
    finally:
        torch.set_autocast_enabled(device, True)
