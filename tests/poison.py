"""Uninitialised memory is NaN: an element that a kernel reads before anybody wrote it, or forgets to write, shows."""

import torch
from torch.utils import deterministic


def poison_memory() -> None:
    """From now on torch fills what `torch.empty` and its kin return: with NaN, or an integer type's largest number.

    That is a part of torch's deterministic mode. The rest of the mode changes nothing on a CPU; on a GPU torch's own
    operations take reproducible algorithms where they have them.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
