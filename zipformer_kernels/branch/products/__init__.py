"""The matrix products of residual branches, with what comes before and after them in the same kernel."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from zipformer_kernels.branch.products.interface import Dropout, Products
from zipformer_kernels.branch.products.plain import BY_TORCH, around
from zipformer_kernels.core import backend as backends
from zipformer_kernels.ops.swoosh_linear import _op as swoosh_linear
from zipformer_kernels.ops.swoosh_linear.product import SwooshLinearLaunchers

__all__ = ["BY_TORCH", "Dropout", "Products", "choose", "unsupported"]

LOW = (torch.float16, torch.bfloat16)
MOST_SEQUENCES = 1 << 16  # kernels find a row's sequence by a quotient in float32


def choose(src: Tensor, low: torch.dtype) -> Products:
    """The products for rows like src that are multiplied in `low`: Triton's, or PyTorch's where those cannot serve.

    Asked once a call of a layer. The surrounding choice of a backend holds; beside PyTorch's products the passes of
    ``swoosh_linear`` are those of the backend that the op would get.
    """
    device = src.device.type
    if "triton" in backends.candidates(device, ("triton",)) and unsupported(src, low) is None:
        return _triton()
    for name in backends.candidates(device, swoosh_linear.backends):
        own, x = swoosh_linear.backends.get(name), src.new_empty(0, dtype=low)
        serves = isinstance(own, SwooshLinearLaunchers) and backends.unserved_device(name, device) is None
        if serves and own.supports(x, None, None, None, "l", low) is None:
            return around(own)
    return BY_TORCH


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
