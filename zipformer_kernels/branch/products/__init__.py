"""The matrix products of residual branches, with what comes before and after them in the same kernel."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from zipformer_kernels.branch.products.interface import Dropout, Products
from zipformer_kernels.branch.products.plain import BY_TORCH
from zipformer_kernels.core import backend as backends

__all__ = ["BY_TORCH", "Dropout", "Products", "choose", "unsupported"]

LOW = (torch.float16, torch.bfloat16)
MOST_SEQUENCES = 1 << 16  # kernels find a row's sequence by a quotient in float32


def choose(src: Tensor, low: torch.dtype) -> Products:
    """The products for rows like src that are multiplied in `low`: Triton's, or PyTorch's where those cannot serve.

    Asked once a call of a layer. The surrounding choice of a backend holds; PyTorch's are those of every backend but
    ``triton``.
    """
    if unsupported(src, low) is not None:
        return BY_TORCH
    request = backends.requested()
    if request == "auto":
        names = backends.serving.get(src.device.type, ())
    else:
        names = backends.asked_for(None, request, ("triton",))
    return _triton() if "triton" in names else BY_TORCH


def unsupported(src: Tensor, low: torch.dtype) -> str | None:
    """Why Triton's products cannot serve rows like src that are multiplied in `low`, or None if they can."""
    if low not in LOW:
        return f"products in Triton take half precision, got {low}"
    if src.dtype not in (low, torch.float32):
        return f"products in Triton add to float32 or {low}, got {src.dtype}"
    if src.shape[1] > MOST_SEQUENCES:
        return f"products in Triton take {MOST_SEQUENCES} sequences at most, got {src.shape[1]}"
    return backends.unserved_device("triton", src.device.type)


def _triton() -> Products:
    return importlib.import_module("zipformer_kernels.branch.products.triton").TRITON
