"""What the launchers of the bypass on a GPU share: its arguments as rows, and the gradients they fill in."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.launch import GPU_DTYPES, as_empty_like, unsupported_dtype


def unsupported(*tensors: Tensor) -> str | None:
    """Why kernels on a GPU cannot serve a call, or None if they can."""
    return next(filter(None, (unsupported_dtype(x, GPU_DTYPES) for x in tensors)), None)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """What the dtypes promote to: that of the result."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


class Rows:
    """The arguments as kernels take them: contiguous, the scale in float32, its channels those of a row.

    Where each sequence has a scale of its own a row is a frame, with the channels of all sequences. The others are of
    the result's dtype, or of one kind of half precision where that is float32.
    """

    def __init__(self, src_orig: Tensor, src: Tensor, scale: Tensor) -> None:
        self.given = src_orig, src, scale
        self.dtype = result_dtype(src_orig, src, scale)
        if src_orig.dtype != src.dtype and torch.float32 not in (src_orig.dtype, src.dtype):
            src_orig, src = src_orig.to(self.dtype), src.to(self.dtype)
        self.a, self.b = src_orig.contiguous(), src.contiguous()
        self.c = scale.to(torch.float32).contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows, and how many channels."""
        channels = self.c.numel()
        return self.a.numel() // max(channels, 1), channels

    def result(self) -> Tensor:
        """y, contiguous and uninitialised."""
        return torch.empty_like(self.a, dtype=self.dtype)

    def returned(self, y: Tensor) -> Tensor:
        """y with the strides that the op promises."""
        return as_empty_like(y, self.given[0])


class Gradients:
    """The gradients that are wanted, uninitialised (zero if there are no rows), and room for partial sums."""

    def __init__(self, rows: Rows, needs: tuple[bool, ...], parts: int) -> None:
        self.rows = rows
        self.parts = parts
        self.da = torch.empty_like(rows.a) if needs[0] else None
        self.db = torch.empty_like(rows.b) if needs[1] else None
        new = torch.empty_like if rows.a.numel() > 0 else torch.zeros_like
        self.dc = new(rows.c) if needs[2] else None
        self.partials = rows.c.new_empty(parts, rows.c.numel()) if needs[2] else None

    def returned(self) -> tuple[Tensor | None, ...]:
        """The gradients in the dtypes and strides of the arguments."""
        return tuple(
            None if gradient is None else as_empty_like(gradient.to(x.dtype), x)
            for gradient, x in zip((self.da, self.db, self.dc), self.rows.given, strict=True)
        )
