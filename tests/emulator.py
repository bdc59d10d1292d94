"""Puts the emulator's build of the compiled module in place."""

from collections.abc import Iterator
from contextlib import contextmanager

from compiled import emulated_module

from zipformer_kernels.core import backend


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Within the block the backend ``cuda`` runs in the emulator, on CPU tensors."""
    previous = backend.native
    backend.native = emulated_module()
    backend.refresh()
    try:
        yield
    finally:
        backend.native = previous
        backend.refresh()
