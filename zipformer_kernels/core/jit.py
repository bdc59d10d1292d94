"""Launches of Triton kernels that cost the host little: `jit`, in place of ``triton.jit`` for what Python launches.

``kernel[grid](*args, **named)`` launches as Triton's own does. Triton asks at every launch which of the kernel's
compiled forms is the right one, by types, alignments and values, in general code that takes 5 to 15 us. Here the first
launch of a form is Triton's, and the compiled kernel that it chose is kept, under a key at least as fine as its own.
Later launches take it by that key, and hand it addresses in place of tensors: 1 to 3 us. That the tensors can be read
is asked before (`zipformer_kernels.core.call`).

Triton itself launches wherever that would not be the same: in its interpreter; for profilers' hooks, and where
``JITFunction.run`` was replaced; with arguments of other kinds; on AMD's GPUs, where a form is one of a tensor's size,
too; and in other versions than those that are read here (`VERSIONS`), which may call compiled kernels in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from zipformer_kernels.core.backend import TRITON_INTERPRETS
from zipformer_kernels.core.call import PLAIN
from zipformer_kernels.core.private import current_device

VERSIONS = "3.4", "3.5", "3.6"
"""The versions of Triton whose way to launch is known."""

ALIGNMENT = 16
"""Of addresses, and of integers, what kernels are compiled to know: whether this divides them."""

_run = JITFunction.run  # what stands in its place later is somebody's who wants to see launches


class _Unknown(Exception):
    """An argument of a kind that only Triton knows."""


class _Forms(dict):
    """What of a number a kernel is compiled for, by the number: whether it is 1, its width, whether 16 divides it."""

    def __missing__(self, number: int) -> tuple[bool, ...]:
        if len(self) >= 1 << 16:
            self.clear()
        bits = number.bit_length()
        form = self[number] = number == 1, number % ALIGNMENT == 0, bits > 31, bits > 63, number < 0
        return form


_FORMS = _Forms()


def _form(value: Any) -> type:
    """What of an argument that is neither a tensor nor an integer a kernel is compiled for: its type alone."""
    if value is None or type(value) in (float, bool):
        return type(value)
    raise _Unknown


def _alignments(*places: Any) -> tuple[bool, ...]:
    return tuple(type(x) is int and x % ALIGNMENT == 0 for x in places)


class _Watchers:
    """Who wants Triton itself to launch: those who hook into launches, debuggers, and tests."""

    def __init__(self) -> None:
        from triton import knobs  # since 3.4

        self._runtime, self._compilation = knobs.runtime, vars(knobs.compilation)
        self._hooks = self._runtime.launch_enter_hook, self._runtime.launch_exit_hook
        self._calls = tuple(getattr(hook, "calls", () if hook is None else (hook,)) for hook in self._hooks)

    def __call__(self) -> bool:
        runtime, (enter, leave), (entering, leaving) = self._runtime, self._hooks, self._calls
        return not (
            JITFunction.run is _run
            and runtime.launch_enter_hook is enter
            and runtime.launch_exit_hook is leave
            and not entering
            and not leaving
            and not runtime.debug
            and "instrumentation_mode" not in self._compilation
        )


class _Place:
    """The current device and its current stream, asked of Triton's driver."""

    def __init__(self) -> None:
        self._driver: Any = None
        self.stream: Callable[[int], int]
        self._device: Callable[[], int]

    def device(self) -> int:
        """The number of the current device."""
        active = driver.active
        if active is not self._driver:
            self._driver, self.stream = active, active.get_current_stream
            ours = active.get_current_device is torch.cuda.current_device  # which looks whether CUDA has started, too
            self._device = current_device if ours else active.get_current_device
        return self._device()


class Kernel(JITFunction):
    """A Triton kernel whose compiled forms are found quickly. Other kernels call it as they do any function."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._launch, grid)

    @cached_property
    def _launch(self) -> Callable[..., Any]:
        """A function ``(grid, *args, **named)`` that launches the kernel, written for its parameters: see `_source`."""
        if any(p.annotation and not p.is_constexpr for p in self.params):
            return lambda grid, *args, **named: self.run(*args, grid=grid, warmup=False, **named)
        place = _Place()
        names = {
            "PLAIN": PLAIN,
            "Unknown": _Unknown,
            "forms": _FORMS,
            "form_of": _form,
            "alignments": _alignments,
            "compiled": self._compiled,
            "place": place,
            "device_now": place.device,
            "watched": _Watchers(),
            "hooks": self.pre_run_hooks,
            "by_triton": self._by_triton,
        }
        exec(_source(self.params), names | {f"default_{p.name}": p.default for p in self.params}, names)
        return names["launch"]

    @cached_property
    def _compiled(self) -> dict[Any, tuple[Any, ...]]:
        """What launches each compiled kernel, two arguments of that, and the kernel itself; by its form."""
        return {}

    def _by_triton(self, form: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Launches as Triton does. What it compiles is kept under the form, if there is one."""
        options = {name: value for name, value in options.items() if value is not None}
        kernel = self.run(*args, grid=grid, warmup=False, **options)
        if form is not None and kernel is not None:  # a hook may keep Triton from compiling
            self._compiled[form] = kernel.run, kernel.function, kernel.packed_metadata, kernel
        return kernel


_ARGUMENT = """
        if {0}.__class__ in PLAIN:
            {0}_place = {0}.data_ptr()
            addresses |= {0}_place
            {0}_form = {0}.dtype
        else:
            {0}_place = {0}
            {0}_form = forms[{0}] if {0}.__class__ is int else form_of({0})
"""
_FUNCTION = """
def launch(grid, {signature}, *, num_warps=None, num_stages=None, **others):
    addresses, form = 0, None
    try:
{arguments}
        aligned = addresses % {ALIGNMENT} == 0 or alignments({places})
        device = device_now()
        form = (device, aligned, num_warps, num_stages, {forms})
        found = compiled.get(form)
    except (Unknown, TypeError):
        form = found = None
    if others or hooks or watched() or grid.__class__ is not tuple:
        form = found = None
    if found is None:
        return by_triton(form, grid, ({values},), {{"num_warps": num_warps, "num_stages": num_stages, **others}})
    run, function, metadata, kernel = found
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, place.stream(device), function, metadata, None, None, None, {places})
    return kernel
"""


def _source(parameters: list[Any]) -> str:
    """The text of a function that launches a kernel of these parameters.

    A loop over the arguments would take four times as long. The form that it looks up has the device, options, dtypes,
    alignments, what `_Forms` says of integers, and constants with their types.
    """
    others = [p.name for p in parameters if not p.is_constexpr]
    return _FUNCTION.format(
        ALIGNMENT=ALIGNMENT,
        signature=", ".join(p.name + f"=default_{p.name}" * p.has_default for p in parameters),
        arguments="".join(_ARGUMENT.format(name) for name in others),
        forms=", ".join(f"{p.name}, {p.name}.__class__" if p.is_constexpr else f"{p.name}_form" for p in parameters),
        places=", ".join(p.name if p.is_constexpr else f"{p.name}_place" for p in parameters),
        values=", ".join(p.name for p in parameters),
    )


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorates a kernel that Python launches; arguments and result as of ``triton.jit``."""
    if function is None:
        return partial(jit, **options)
    known = triton.__version__.startswith(tuple(f"{version}." for version in VERSIONS)) and torch.version.hip is None
    if TRITON_INTERPRETS or not known:
        return triton.jit(function, **options)
    return Kernel(function, **options)
