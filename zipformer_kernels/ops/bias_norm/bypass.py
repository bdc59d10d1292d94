"""What the launchers of BiasNorm with the bypass after it share: arguments as rows, and the gradients they fill in."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.launch import GPU_DTYPES, as_empty_like, unsupported_dtype
from zipformer_kernels.ops.bias_norm.reference import bypass_dtype
from zipformer_kernels.ops.bias_norm.rows import Rows

PARTIAL_LINE = 16
"""Room in a row of partial sums behind those of the channels, so that rows begin where 16 bytes do, as csrc has it."""


def unsupported(*tensors: Tensor) -> str | None:
    """Why kernels on a GPU cannot serve a call, or None if they can; of the dtypes alone."""
    return next(filter(None, (unsupported_dtype(x, GPU_DTYPES) for x in tensors)), None)


class BypassRows(Rows):
    """The arguments as kernels take them: x and src_orig contiguous, src_orig in the dtype of the result, else float32.

    Rows are frames times sequences; there is one sequence where all share a scale.
    """

    def __init__(self, x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor) -> None:
        super().__init__(x, bias, log_scale)
        self.given = x, bias, log_scale, src_orig, scale
        self.dtype = bypass_dtype(x, bias, src_orig, scale)
        self.src_orig = src_orig.to(self.dtype).contiguous()
        self.scale = scale.to(self.wide).contiguous()
        self.sequences = scale.shape[0] if scale.ndim == 2 else 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many frames, sequences and channels."""
        channels = self.x.shape[-1]
        return self.x.numel() // max(channels * self.sequences, 1), self.sequences, channels

    def inputs(self) -> tuple[Tensor, ...]:
        """In the order in which kernels take them."""
        return self.x, self.bias, self.log_scale, self.src_orig, self.scale

    def results(self) -> tuple[Tensor, Tensor]:
        """y, contiguous, and the inverse RMS of each row, uninitialised."""
        y = torch.empty_like(self.x, dtype=self.dtype)
        return y, self.x.new_empty(self.x.shape[:-1], dtype=self.wide)

    def parts(self, shortest: int, most: int) -> int:
        """Into how many groups to split the frames of each sequence: of `shortest` frames at least, `most` in all."""
        frames, sequences, _ = self.shape
        return max(1, min(most // max(sequences, 1), frames // shortest))


class BypassGradients:
    """The gradients that are wanted, uninitialised (zero if x is empty), and room for partial sums.

    Attributes:
        parts: groups of frames of each sequence, whose sums are taken apart.
        partials: (parts, sequences, 2 channels + `PARTIAL_LINE`): sums of scale, of bias, and of log_scale.
    """

    def __init__(self, rows: BypassRows, needs: tuple[bool, ...], parts: int) -> None:
        self.rows = rows
        self.parts = parts
        new = torch.empty_like if rows.x.numel() > 0 else torch.zeros_like
        made = (new(x) if need else None for x, need in zip(rows.inputs(), needs, strict=True))
        self.all = self.dx, self.dbias, self.dlog_scale, self.dsrc_orig, self.dscale = tuple(made)
        summed = needs[1] or needs[2] or needs[4]
        self.partials = rows.bias.new_empty(parts, rows.sequences, 2 * rows.shape[2] + PARTIAL_LINE) if summed else None

    def returned(self) -> tuple[Tensor | None, ...]:
        """The gradients in the dtypes and strides of the arguments."""
        return tuple(
            None if gradient is None else as_empty_like(gradient.to(x.dtype), x)
            for gradient, x in zip(self.all, self.rows.given, strict=True)
        )
