"""The lanes every op is tested on: each backend as it can run on this machine.

With a GPU: ``triton`` and ``cuda`` on it. Without: Triton's interpreter and the CUDA emulator, on CPU tensors.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from emulator import emulated_cuda

from zipformer_kernels.branch.ways import WAYS
from zipformer_kernels.core import backend
from zipformer_kernels.core.op import Op

HAS_GPU = torch.cuda.is_available()


ISAS = ("baseline", "avx2", "avx512")


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Within the block the CPU kernels run on this instruction set; None leaves it as it is."""
    if name is None:
        yield
        return
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    native, before = backend.native, backend.native.current_isa()
    try:
        native.set_isa(name)
    except ValueError:
        pytest.skip(f"a processor with {name} would run this")
    try:
        yield
    finally:
        native.set_isa(before)


@dataclass(frozen=True)
class Lane:
    """A backend and the device its tests run on."""

    backend: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if HAS_GPU and self.backend in ("triton", "cuda") else "cpu")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        double = () if self.backend in ("triton", "cuda") else (torch.float64,)
        return (torch.float32, torch.float16, torch.bfloat16, *double)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Ops called within the block run on this lane, or raise."""
        with ExitStack() as stack:
            if self.backend == "cuda" and not HAS_GPU:
                stack.enter_context(emulated_cuda())
            reason = backend.missing[self.backend]
            if reason is not None:
                pytest.skip(f"{self.backend}: {reason}")
            if self.backend in ("triton", "cuda") and not HAS_GPU:  # layers run as on a GPU
                stack.enter_context(mock.patch.dict(WAYS, cpu=WAYS["cuda"]))
            stack.enter_context(backend.use_backend(self.backend))
            yield


def lanes(op: Op, *excluded: str) -> list:
    """One pytest parameter per backend that `op` offers (Triton is offered only where it can be imported)."""
    return [
        pytest.param(Lane(name), id=name) for name in backend.BACKENDS if name in op.backends and name not in excluded
    ]
