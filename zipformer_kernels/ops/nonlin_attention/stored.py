"""NonlinAttention between its projections in training, with weights of one head that are stored on the CPU.

With s, x, y the thirds of a projection, V = x tanh(s) and O = W V::

    out = O y;   G = dout y,  dy = dout O,  dV = W^T G,  ds = dV x (1 - tanh(s)^2),  dx = dV tanh(s)

V, O and G are what the use leaves to backward of the weights, see `zipformer_kernels.ops.attention.stored`. Each gate
is one pass; V is computed again in backward, and the gradients of the thirds are written side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import reference_gradients, store, stored_tensors
from zipformer_kernels.core.call import plain, without_autocast
from zipformer_kernels.core.joint import side_by_side
from zipformer_kernels.core.launch import DTYPE_CODES, INFERENCE_DTYPES, call_cpu, pointer
from zipformer_kernels.ops.attention.stored import Piece, Uses
from zipformer_kernels.ops.nonlin_attention.cpu import NO_ROWS, close, open_, rows
from zipformer_kernels.ops.nonlin_attention.reference import infer


class _GatedAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uses: Uses, w: Tensor, s: Tensor, x: Tensor, y: Tensor) -> Tensor:
        projected = side_by_side(s, x, y)
        average = (w[0] @ open_(projected, None).transpose(0, 1)).transpose(0, 1)
        ctx.uses = uses
        store(ctx, w, s, x, y, average)
        return close(projected, None, average)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, *thirds, average = stored_tensors(ctx)
        if torch.is_grad_enabled() or not plain(grad, w, *thirds, average):  # what is left could not be differentiated
            dense = lambda w, *thirds: infer(torch.cat(thirds, dim=2), None, w)  # noqa: E731
            return None, *reference_gradients(dense, (w, *thirds), ctx.needs_input_grad[1:], grad)
        projected = side_by_side(*thirds)
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        inner = _by_sequence(average)
        gradients = torch.empty_like(projected)
        _call("close_backward", projected, [grad, average, inner], gradients)
        dvalues = without_autocast(torch.matmul, w[0].transpose(1, 2), inner.transpose(0, 1)).transpose(0, 1)
        _call("open_backward", projected, [dvalues], gradients)
        weights, _ = ctx.next_functions[0]
        ctx.uses.leave(weights, *(t.unsqueeze(2) for t in (open_(projected, None), average, inner)))
        return None, None, *gradients.chunk(3, dim=2)


def serves(pieces: tuple[Piece, ...], s: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether `gated_average` can take these weights and thirds."""
    one = len(pieces) == 1 and len(pieces[0]) == 1 and pieces[0].serves(x)
    return one and plain(s, x, y) and x.dtype in INFERENCE_DTYPES and side_by_side(s, x, y) is not None


def gated_average(piece: Piece, s: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(W (x tanh(s))) y, (T, B, C), of thirds that lie side by side."""
    return _GatedAverage.apply(piece.uses, piece.w, s, x, y)


def _by_sequence(like: Tensor) -> Tensor:
    """Uninitialised, shaped as (T, B, C), one sequence after the other in memory."""
    frames, batch, channels = like.shape
    return like.new_empty(batch, frames, channels).transpose(0, 1)


def _call(name: str, projected: Tensor, tensors: list[Tensor], gradients: Tensor) -> None:
    grad, average, inner = [*map(rows, tensors), NO_ROWS, NO_ROWS][:3]
    frames, batch, width = projected.shape
    sizes = frames, batch, width // 3, DTYPE_CODES[projected.dtype]
    inputs = pointer(projected), grad, average, inner
    call_cpu(f"nonlin_attention_{name}", projected, *inputs, pointer(gradients), *sizes)
