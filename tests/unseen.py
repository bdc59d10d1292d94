"""Lets a test watch what torch allocates around kernels: they make way for every other mode that looks on."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def unseen(mode: TorchDispatchMode) -> Iterator[TorchDispatchMode]:
    """Within the block the mode is active, and kernels run as if it were not."""
    with mock.patch.object(torch._C, "_len_torch_dispatch_stack", return_value=0), mode:
        yield mode
