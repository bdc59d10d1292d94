"""The bypass through the compiled module: ``csrc/bypass/cpu.cpp``."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    as_empty_like,
    call_cpu,
    contiguous,
    pointer,
    unsupported_dtype,
)
from zipformer_kernels.core.op import Launchers

PARTS = tuning.entry("bypass.parts")
PART_ROWS = tuning.entry("bypass.part_rows")


def _forward(src_orig: Tensor, src: Tensor, scale: Tensor) -> tuple[Tensor]:
    a, b, c = _alike(src_orig, src, scale)
    y = torch.empty_like(a)
    if y.numel() > 0:
        channels = c.numel()
        sizes = y.numel() // channels, channels, DTYPE_CODES[y.dtype]
        call_cpu("bypass_forward", y, *map(pointer, (a, b, c, y)), *sizes)
    return (as_empty_like(y, src_orig),)


def _backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], src_orig: Tensor, src: Tensor, scale: Tensor
) -> tuple[Tensor | None, ...]:
    g, c = _alike(grads[0], scale)  # of the dtype that all promote to, which y has
    a, b = (x.to(g.dtype) for x in contiguous(src_orig, src)) if needs[2] else (None, None)
    empty = g.numel() == 0
    da, db = (torch.empty_like(g) if need else None for need in needs[:2])
    dc = (torch.zeros_like if empty else torch.empty_like)(c) if needs[2] else None
    if not empty:
        channels = c.numel()
        rows = g.numel() // channels
        parts = max(1, min(PARTS.value, rows // PART_ROWS.value))
        wide = torch.promote_types(c.dtype, torch.float32)
        partials = c.new_empty((parts, channels), dtype=wide) if needs[2] else None
        tensors = map(pointer, (g, a, b, c, da, db, dc, partials))
        call_cpu("bypass_backward", g, *tensors, rows, channels, parts, DTYPE_CODES[g.dtype])
    return tuple(
        None if gradient is None else as_empty_like(gradient.to(x.dtype), x)
        for gradient, x in ((da, src_orig), (db, src), (dc, scale))
    )


def _alike(*tensors: Tensor) -> list[Tensor]:
    """The tensors contiguous and in the dtype that they promote to: under autocast src is narrower than src_orig."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype).contiguous() for x in tensors]


def _unsupported(*tensors: Tensor) -> str | None:
    return next(filter(None, (unsupported_dtype(x, CPU_DTYPES) for x in tensors)), None)


launchers = Launchers(_unsupported, _forward, _backward)
