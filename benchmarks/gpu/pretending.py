"""Tells the package that tensors of the CPU are a GPU's, so that it chooses and launches what it would there.

Import it before the package, which leaves Triton out where torch sees no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

with mock.patch("torch.cuda.is_available", return_value=True):
    from zipformer_kernels.branch import ways
    from zipformer_kernels.core import backend, launch

TARGET = "9.0"
MULTIPROCESSORS = 132  # of an H100 and of an H200


class Compiler:
    """A Triton driver for a compute capability that has nothing to run on: what is launched there does nothing."""

    def __init__(self, target: str = TARGET) -> None:
        self._capability = int(target.replace(".", ""))
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda name, kernel, shared, device: (0, 0, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return _launch_nothing


def _launch_nothing(*_: Any) -> None:
    pass


class _Autocast(torch.autocast):
    """What is said to CUDA's autocast is said to the CPU's, where the tensors are."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextlib.contextmanager
def as_on_a_gpu(native: ModuleType | SimpleNamespace | None = None, target: str = TARGET) -> Iterator[None]:
    """Within the block backends, ways and sizes of launches are those of a GPU. Triton keeps its driver afterwards.

    Args:
        native: the module with CUDA kernels, whose ``build`` says that it is emulated; without it there are none.
        target: the compute capability that Triton compiles for.
    """
    replaced = [
        (launch.multiprocessors, lambda x: MULTIPROCESSORS),
        (ways.only_computes, lambda *_: False),
    ]
    patches = [
        mock.patch.object(backend, "TRITON_INTERPRETS", True),
        mock.patch.object(backend, "native", native),
        mock.patch.dict(backend.registry, {name: _preferred(known) for name, known in backend.registry.items()}),
        mock.patch.dict(ways.WAYS, {"cpu": ways.WAYS["cuda"]}),
        mock.patch.object(torch.amp, "autocast", _Autocast),
        mock.patch.object(torch.amp.autocast_mode, "autocast", _Autocast),
        mock.patch("zipformer_kernels.training.randomness.has_values", return_value=False),
    ]
    for function, instead in replaced:
        patches += everywhere(function, instead)
    driver.set_active(Compiler(target))
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            backend.refresh()
            yield
    finally:
        backend.refresh()


def everywhere(function: Any, instead: Any) -> list[Any]:
    """Patches that put another function in the place of one of the package's, in all modules that have it."""
    name = function.__name__
    users = [module for known, module in sys.modules.items() if known.startswith("zipformer_kernels")]
    return [mock.patch.object(user, name, instead) for user in users if getattr(user, name, None) is function]


def _preferred(known: backend.Backend) -> backend.Backend:
    """The backend, chosen for CPU tensors as it is for a GPU's."""
    place = known.preferred.get("cuda")
    return dataclasses.replace(known, preferred={} if place is None else {"cpu": place})
