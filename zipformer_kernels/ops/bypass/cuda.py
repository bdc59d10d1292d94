"""The bypass on NVIDIA GPUs: ``csrc/bypass/cuda.cu``."""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import DTYPE_CODES, call_cuda, cdiv, multiprocessors, pointer
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bypass.rows import Gradients, Rows, unsupported

BLOCKS_PER_MULTIPROCESSOR = tuning.entry("bypass.cuda_blocks")
PART_ROWS = tuning.entry("bypass.cuda_part_rows")
COLUMNS = tuning.entry("bypass.cuda_columns")


def _forward(src_orig: Tensor, src: Tensor, scale: Tensor) -> tuple[Tensor]:
    rows = Rows(src_orig, src, scale)
    y = rows.result()
    if y.numel() > 0:
        tensors = map(pointer, (rows.a, rows.b, rows.c, y))
        call_cuda("bypass_forward", y, *tensors, *rows.shape, *_dtypes(rows))
    return (rows.returned(y),)


def _backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], src_orig: Tensor, src: Tensor, scale: Tensor
) -> tuple[Tensor | None, ...]:
    rows = Rows(src_orig, src, scale)
    out = Gradients(rows, needs, _parts(rows))
    if rows.a.numel() > 0:
        g = grads[0].contiguous()
        tensors = map(pointer, (g, rows.a, rows.b, rows.c, out.da, out.db, out.dc, out.partials))
        call_cuda("bypass_backward", g, *tensors, *rows.shape, out.parts, *_dtypes(rows))
    return out.returned()


def _parts(rows: Rows) -> int:
    """How many blocks share the rows of the same channels."""
    count, channels = rows.shape
    most = BLOCKS_PER_MULTIPROCESSOR.value * multiprocessors(rows.a) // cdiv(max(channels, 1), COLUMNS.value)
    return max(1, min(most, count // PART_ROWS.value))


def _dtypes(rows: Rows) -> tuple[int, ...]:
    return tuple(DTYPE_CODES[dtype] for dtype in (rows.a.dtype, rows.b.dtype, rows.dtype))


launchers = Launchers(unsupported, _forward, _backward)
