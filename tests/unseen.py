"""Lets a test watch what torch allocates around kernels: they make way for every other mode that looks on."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from zipformer_kernels.core import call


@contextmanager
def unseen(mode: TorchDispatchMode) -> Iterator[TorchDispatchMode]:
    """Within the block the mode is active, and kernels run as if it were not."""
    with mock.patch.object(call, "count_dispatch_modes", return_value=0), mode:
        yield mode
