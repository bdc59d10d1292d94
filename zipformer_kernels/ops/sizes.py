"""Sizes that a recorded program keeps as variables, so that it holds for every length and batch size.

torch.jit.trace, torch.export and the ONNX exporters follow a size through arithmetic, `arange`, gathers and `reshape`.
They keep the example's where Python decides: at a branch, at `len`, `min` and `max`; the ONNX exporter of old also at
`unflatten`. A slice or a pad ties torch.export to lengths for which it can prove that they fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.call import being_traced


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):  # as torch.jit.trace has them
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return torch.sym_min(a, b)


def first(x: Tensor, size: int, dim: int) -> Tensor:
    """The first `size` elements of x along a dimension."""
    if being_traced():
        return x.index_select(dim, torch.arange(size, device=x.device))
    return x.narrow(dim, 0, size)


def split_last(x: Tensor, heads: int) -> Tensor:
    """From (..., heads * channels) to (..., heads, channels)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
