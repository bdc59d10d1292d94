"""BiasNorm through the compiled module: what the CPU's and CUDA's launchers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zipformer_kernels.core.launch import DTYPE_CODES, pointer
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bias_norm.rows import Gradients, Rows, unsupported


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


def launchers_by(call: Callable[..., None], dtypes: tuple[torch.dtype, ...], parts: Callable[[Rows], int]) -> Launchers:
    """The launchers whose kernels `call` calls.

    Args:
        call: calls a function of the compiled module.
        dtypes: of x, that the kernels take.
        parts: into how many groups the rows are cut, whose gradients are summed apart.
    """
    return Launchers(
        supports=partial(unsupported, dtypes),
        forward=partial(_forward, call),
        backward=partial(_backward, call, parts),
    )
