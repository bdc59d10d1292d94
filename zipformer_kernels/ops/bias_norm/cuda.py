"""BiasNorm, and the bypass after it, on NVIDIA GPUs: ``csrc/bias_norm/cuda.cu`` and ``cuda_bypass.cu``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import DTYPE_CODES, GPU_DTYPES, call_cuda, multiprocessors, pointer
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bias_norm.bypass import BypassGradients, BypassRows, unsupported
from zipformer_kernels.ops.bias_norm.native import launchers_by
from zipformer_kernels.ops.bias_norm.rows import Rows

BLOCKS_PER_MULTIPROCESSOR = tuning.entry("bias_norm.cuda_blocks")
PART_FRAMES = tuning.entry("bias_norm.cuda_part_frames")
WIDEST = 1024  # channels of a row that csrc/bias_norm/cuda_bypass.cu holds in a warp's registers
ACCESS = 16  # bytes


def _blocks(rows: Rows) -> int:
    """One group of rows for each block."""
    return rows.groups(shortest=1, most=_most_blocks(rows))


def _most_blocks(rows: Rows) -> int:
    return BLOCKS_PER_MULTIPROCESSOR.value * multiprocessors(rows.x)


def _bypass(x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = BypassRows(x, bias, log_scale, src_orig, scale)
    y, inverse_rms = rows.results()
    if x.numel() > 0:
        inputs = _aligned(*rows.inputs())  # held until the launch
        tensors = map(pointer, (*inputs, y, inverse_rms))
        call_cuda("bias_norm_bypass_forward", x, *tensors, *rows.shape, DTYPE_CODES[x.dtype], DTYPE_CODES[y.dtype])
    return rows.returned(y), inverse_rms


def _bypass_backward(needs: tuple, grads: tuple, saved: tuple, *args: Tensor) -> tuple[Tensor | None, ...]:
    rows = BypassRows(*args)
    out = BypassGradients(rows, needs, rows.parts(shortest=PART_FRAMES.value, most=_most_blocks(rows)))
    if rows.x.numel() > 0:
        inputs = _aligned(grads[0].contiguous(), *rows.inputs())
        tensors = map(pointer, (*inputs, saved[0], *out.all, out.partials))
        dtypes = DTYPE_CODES[rows.x.dtype], DTYPE_CODES[rows.dtype]
        call_cuda("bias_norm_bypass_backward", rows.x, *tensors, *rows.shape, out.parts, *dtypes)
    return out.returned()


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where they do not begin at a multiple of what kernels access at once."""
    return [x if x.data_ptr() % ACCESS == 0 else x.clone() for x in tensors]


def _unsupported(x: Tensor, *others: Tensor) -> str | None:
    reason, step = unsupported(x, *others), ACCESS // x.element_size()
    if reason is None and (x.shape[-1] > WIDEST or x.shape[-1] % step != 0):
        return f"it takes at most {WIDEST} channels, a multiple of {step}, got {x.shape[-1]}"
    return reason


launchers = replace(
    launchers_by(call_cuda, GPU_DTYPES, _blocks),
    variants={"bypass": Launchers(_unsupported, _bypass, _bypass_backward)},
)
