"""Sizes that a recorded program keeps as variables, so that it holds for every length and batch size.

torch.jit.trace, torch.export and the ONNX exporters follow a size through arithmetic, `arange`, gathers and `reshape`.
They keep the example's where Python decides: at a branch, at `len`, `min` and `max`; the ONNX exporter of old also at
`unflatten`. A slice or a pad ties torch.export to lengths for which it can prove that they fit; to ask for the order of
strides, as `contiguous` and `reshape` do, to lengths that do not come down to one frame in any stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from zipformer_kernels.core.call import being_traced, exports_calls
from zipformer_kernels.core.private import sizes_of_one_are_open

P, R = ParamSpec("P"), TypeVar("R")


def of_every_size(forward: Callable[P, R]) -> Callable[P, R]:
    """A `forward` whose sizes torch.export leaves open where they come down to 1, too.

    torch.export holds that a size which is no input's own, as that of ``x[::2]``, is not 1 if the example's is not, and
    so refuses lengths for which it is. It has a setting by which 1 is a size like any other, which the ONNX exporter
    uses, too; here it holds inside of `forward`. What a program does with the result is the program's to set.
    ``strict=True``, which records Python's instructions in place of running them, goes without.
    """

    @functools.wraps(forward)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
        if not exports_calls():
            return forward(*args, **kwargs)
        with sizes_of_one_are_open():
            return forward(*args, **kwargs)

    return recorded


def first(x: Tensor, size: int, dim: int) -> Tensor:
    """The first `size` elements of x along a dimension."""
    if being_traced():
        return x.index_select(dim, torch.arange(size, device=x.device))
    return x.narrow(dim, 0, size)


def split_last(x: Tensor, heads: int) -> Tensor:
    """From (..., heads * channels) to (..., heads, channels)."""
    x = compact(x) if being_traced() else x
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """From (frames, B, heads * channels) to (heads, B, frames, channels)."""
    return split_last(x, heads).permute(2, 1, 0, 3)


def merge_heads(x: Tensor) -> Tensor:
    """From (heads, B, frames, channels) to (frames, B, heads * channels)."""
    return compact(x.permute(2, 1, 0, 3)).flatten(2)


def compact(x: Tensor) -> Tensor:
    """x with its elements in order in memory."""
    if being_traced():  # to ask whether they are already would tie torch.export to lengths other than 1
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


def fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """x, and `value` where the mask, which broadcasts to it, is True."""
    if torch.compiler.is_compiling():  # of tensors alike in shape and strides torch.export asks no order of strides
        x, mask = compact(x), compact(mask.expand(x.shape))
    return x.masked_fill(mask, value)
