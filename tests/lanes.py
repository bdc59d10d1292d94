"""The lanes every op is tested on: each backend as it can run on this machine.

With a GPU: ``triton`` and ``cuda`` on it. Without: Triton's interpreter and the CUDA emulator, on CPU tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
import torch
from emulator import emulated_cuda
from torch.utils import deterministic

from zipformer_kernels.core import backend
from zipformer_kernels.core.op import Op
from zipformer_kernels.ops.cases import Case

HAS_GPU = torch.cuda.is_available()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block torch fills memory that is left uninitialised with NaN, so that reading it shows."""
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)


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
            stack.enter_context(backend.use_backend(self.backend))
            yield


def lanes(op: Op, *excluded: str) -> list:
    """One pytest parameter per backend that `op` offers (Triton is offered only where it can be imported)."""
    return [
        pytest.param(Lane(name), id=name) for name in backend.BACKENDS if name in op.backends and name not in excluded
    ]


def assert_reads_only_what_is_written(
    lane: Lane, cases: Sequence[Case], run: Callable, assert_matches: Callable
) -> None:
    """Runs cases where memory left uninitialised is NaN; `run` and `assert_matches` are those of the op's tests."""
    with lane.active(), poisoned_memory():
        for case in cases:
            args = case.inputs(torch.float32, lane.device)
            assert_matches(args, *run(args))
