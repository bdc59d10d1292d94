"""What the launchers of BiasNorm share: its arguments as rows of channels, and the gradients they fill in."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.launch import as_empty_like, unsupported_dtype
from zipformer_kernels.ops.bias_norm.reference import result_dtype, wide_dtype


def unsupported(dtypes: tuple[torch.dtype, ...], x: Tensor, bias: Tensor, log_scale: Tensor) -> str | None:
    """Why kernels for `dtypes` cannot serve a call, or None if they can."""
    reason = unsupported_dtype(x, dtypes) or unsupported_dtype(bias, dtypes)
    if reason is None and bias.dtype == torch.float64 != x.dtype:
        return f"a float64 bias needs a float64 x, got {x.dtype}"
    return reason


class Rows:
    """The arguments as kernels take them: x contiguous, bias and log_scale in the dtype of the arithmetic."""

    def __init__(self, x: Tensor, bias: Tensor, log_scale: Tensor) -> None:
        self.given = x, bias, log_scale
        self.wide = wide_dtype(x, bias)
        self.x = x.contiguous()
        self.bias = bias.to(self.wide).contiguous()
        self.log_scale = log_scale.to(self.wide)

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows, and how many channels."""
        channels = self.x.shape[-1]
        return self.x.numel() // max(channels, 1), channels

    def groups(self, shortest: int, most: int) -> int:
        """Into how many groups to split the rows: at most `most`, each of at least `shortest` rows."""
        return max(1, min(most, self.shape[0] // shortest))

    def results(self) -> tuple[Tensor, Tensor]:
        """y, contiguous, and the inverse RMS of each row, uninitialised."""
        y = torch.empty_like(self.x, dtype=result_dtype(*self.given[:2]))
        return y, self.x.new_empty(self.x.shape[:-1], dtype=self.wide)

    def returned(self, y: Tensor) -> Tensor:
        """y with the strides that the op promises."""
        return as_empty_like(y, self.given[0])


class Gradients:
    """The gradients that are wanted, uninitialised (zero if x is empty), and room for partial sums."""

    def __init__(self, rows: Rows, needs: tuple[bool, ...], parts: int) -> None:
        self.rows = rows
        self.parts = parts
        new = torch.Tensor.new_empty if rows.x.numel() > 0 else torch.Tensor.new_zeros
        self.dx = torch.empty_like(rows.x) if needs[0] else None
        self.dbias = new(rows.bias, rows.bias.shape) if needs[1] else None
        self.dlog_scale = new(rows.log_scale, ()) if needs[2] else None
        summed = needs[1] or needs[2]
        self.partials = rows.bias.new_empty(parts, rows.shape[1] + 1) if summed else None

    def returned(self) -> tuple[Tensor | None, ...]:
        """The gradients in the dtypes and strides of the arguments."""
        x, bias, log_scale = self.rows.given
        return (
            None if self.dx is None else as_empty_like(self.dx, x),
            None if self.dbias is None else self.dbias.to(bias.dtype),
            None if self.dlog_scale is None else self.dlog_scale.to(log_scale.dtype),
        )
