"""swoosh_linear through the compiled module: what the CPU's and CUDA's launchers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zipformer_kernels.core.launch import DTYPE_CODES, as_empty_like, pointer
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.swoosh_linear.layout import layout
from zipformer_kernels.ops.swoosh_linear.product import around_product, unsupported

KINDS = {"l": 0, "r": 1}


def _activate(call: Callable[..., None], x: Tensor, mask: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    a = torch.empty_like(x, dtype=dtype)
    mask, *sizes = layout(x, mask)
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[dtype], KINDS[kind]
    call("swoosh_linear_forward", x, *map(pointer, (x, mask, a)), *sizes, *codes)
    return a


def _differentiate(
    call: Callable[..., None], da: Tensor, x: Tensor, mask: Tensor | None, kind: str, with_a: bool
) -> tuple[Tensor, Tensor | None]:
    given, x = x, x.contiguous()
    dx = torch.empty_like(x)
    a = torch.empty_like(da) if with_a else None
    mask, *sizes = layout(x, mask)
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[da.dtype], KINDS[kind]
    call("swoosh_linear_backward", x, *map(pointer, (da, x, mask, dx, a)), *sizes, *codes)
    return as_empty_like(dx, given), a


def launchers_by(call: Callable[..., None], dtypes: tuple[torch.dtype, ...]) -> Launchers:
    """The launchers whose kernels `call` calls, which take `dtypes`."""
    return around_product(partial(_activate, call), partial(_differentiate, call), partial(unsupported, dtypes))
