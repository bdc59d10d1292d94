"""BiasNorm through the compiled module: ``csrc/bias_norm/cpu.cpp`` and ``csrc/bias_norm/cuda.cu``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    GPU_DTYPES,
    call_cpu,
    call_cuda,
    multiprocessors,
    pointer,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bias_norm.rows import Gradients, Rows, unsupported

BLOCKS_PER_MULTIPROCESSOR = 4


def _forward(call: Callable[..., None], x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = Rows(x, bias, log_scale)
    y, inverse_rms = rows.results()
    if x.numel() > 0:
        call("bias_norm_forward", x, *_inputs(rows), pointer(y), pointer(inverse_rms), *rows.shape, *_dtypes(x, y))
    return rows.returned(y), inverse_rms


def _backward(
    call: Callable[..., None],
    parts: Callable[[Rows], int],
    needs: tuple,
    grads: tuple,
    saved: tuple,
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
) -> tuple[Tensor | None, ...]:
    rows = Rows(x, bias, log_scale)
    dy, (inverse_rms,) = grads[0].contiguous(), saved
    out = Gradients(rows, needs, parts(rows))
    if x.numel() > 0:
        outputs = map(pointer, (out.dx, out.dbias, out.dlog_scale, out.partials))
        pointers = pointer(dy), *_inputs(rows), pointer(inverse_rms), *outputs
        call("bias_norm_backward", x, *pointers, *rows.shape, out.parts, *_dtypes(x, dy))
    return out.returned()


def _inputs(rows: Rows) -> tuple[int, ...]:
    return tuple(map(pointer, (rows.x, rows.bias, rows.log_scale)))


def _dtypes(x: Tensor, y: Tensor) -> tuple[int, int]:
    return DTYPE_CODES[x.dtype], DTYPE_CODES[y.dtype]


def _launchers(call: Callable[..., None], dtypes: tuple[torch.dtype, ...], parts: Callable[[Rows], int]) -> Launchers:
    return Launchers(
        supports=partial(unsupported, dtypes),
        forward=partial(_forward, call),
        backward=partial(_backward, call, parts),
    )


# Groups of rows whose gradients are summed apart: on the CPU so many that threads share them out evenly, but
# each long enough that adding up the groups costs little; on the GPU one for each block.
cpu = _launchers(call_cpu, CPU_DTYPES, lambda rows: rows.groups(shortest=64, most=128))
cuda = _launchers(
    call_cuda,
    GPU_DTYPES,
    lambda rows: rows.groups(shortest=1, most=BLOCKS_PER_MULTIPROCESSOR * multiprocessors(rows.x)),
)
