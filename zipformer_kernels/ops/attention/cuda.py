"""Shared-weight attention on NVIDIA GPUs: ``csrc/attention/cuda_*.cu``. Every use computes the weights again.

Here are the launchers of the op and what they do forward; its gradients are in cuda_gradients.py.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zipformer_kernels.core.launch import GPU_DTYPES, as_empty_like, call_cuda, pointer, unsupported_dtype
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention.aligned import GROUP, aligned_scores, aligned_values, cut
from zipformer_kernels.ops.attention.arguments import Arguments, rows
from zipformer_kernels.ops.attention.cuda_gradients import scores_gradients, values_gradient
from zipformer_kernels.ops.attention.launchers import AttentionLaunchers
from zipformer_kernels.ops.attention.reference import empty_rows
from zipformer_kernels.ops.attention.scores import Masks, Scores, Use, grouped

WIDEST = 32
"""Channels of queries and keys for which there are kernels."""

OLDEST = (8, 0)
"""The compute capability that brought what the kernels are made of."""


def softmax_rows(*args: Tensor | int | None) -> tuple[Tensor]:
    """The forward of the variant ``softmax``."""
    scores, _, masks, _ = grouped(0, args)
    softmax = empty_rows(scores.q)
    if softmax.numel() > 0:
        weights = Arguments(aligned_scores(scores), softmax, masks)  # holds copies until the call is over
        call_cuda("attention_softmax", scores.q, weights.struct())
    return (softmax,)


def average_values(scores: Scores, softmax: Tensor, masks: Masks, values: Tensor) -> Tensor:
    """W V, (T, B, H, C).

    Args:
        scores, masks: what W is made from.
        softmax: the softmax rows.
        values: V, (S, B, H, C), of the dtype of q.
    """
    channels, values = values.shape[3], aligned_values(values)
    out = values.new_empty(scores.q.shape[0], *values.shape[1:])
    if out.numel() > 0:
        weights = Arguments(aligned_scores(scores), softmax, masks)
        call_cuda("attention_forward", values, weights.struct(), rows(values), pointer(out), values.shape[3])
    return cut(out, channels)


def gated_average(scores: Scores, softmax: Tensor, masks: Masks, values: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """W V and, of the unrounded W V, the product (W V) y, both (T, B, H, C).

    Args:
        scores, softmax, masks, values: as of `average_values`.
        y: (T, B, H, C), of the dtype of q.
    """
    channels, values, y = values.shape[3], aligned_values(values), aligned_values(y)
    out, gated = (values.new_empty(scores.q.shape[0], *values.shape[1:]) for _ in range(2))
    if out.numel() > 0:
        weights = Arguments(aligned_scores(scores), softmax, masks)
        given = weights.struct(), rows(values), pointer(out), values.shape[3], rows(y), pointer(gated)
        call_cuda("attention_gated_forward", values, *given)
    return cut(out, channels), cut(gated, channels)


def _forward(*args: Tensor | int | float | None) -> tuple[Tensor]:
    scores, (v, softmax), masks, _ = grouped(2, args)
    return (average_values(scores, softmax, masks, v),)


def _backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | float | None
) -> tuple[Tensor | None, ...]:
    scores, (v, softmax), masks, penalty = grouped(2, args)
    (out,), grad = saved, grads[0].to(v.dtype)
    use = Use(slice(None), v, out, grad)
    dscores = scores_gradients(needs[:4], scores, softmax, masks, penalty, [use])
    dv = as_empty_like(values_gradient(scores, softmax, masks, grad), v) if needs[4] else None
    return *dscores, dv, None, None, None


def unsupported(
    q: Tensor, k: Tensor, p: Tensor | None, e: Tensor | None, *rest: Tensor | int | float | None
) -> str | None:
    """Why the kernels cannot take these arguments, or None if they can."""
    values = [x for x in rest if isinstance(x, Tensor) and x.is_floating_point()][:-1]  # the last are softmax rows
    dtypes = [x.dtype for x in (q, k, p, e, *values) if x is not None]
    if len(set(dtypes)) > 1:
        return f"it takes tensors of one dtype, got {', '.join(map(str, dtypes))}"
    if e is not None and e.ndim == 4:
        return "it takes one set of position projections for all sequences, got one for each"
    if q.shape[3] > WIDEST:
        return f"it takes up to {WIDEST} query channels per head, got {q.shape[3]}"
    if p is not None and p.shape[3] > GROUP:
        return f"it takes up to {GROUP} position channels per head, got {p.shape[3]}"
    if q.is_cuda and _capability(q.device) < OLDEST:
        return "it takes GPUs of compute capability {}.{} or later, got {}.{}".format(*OLDEST, *_capability(q.device))
    return unsupported_dtype(q, GPU_DTYPES)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def worthwhile(q: Tensor, *rest: object) -> bool:
    """Whether ``auto`` should choose these kernels, which in float32 have no matrix instruction: there Triton's are as
    fast.
    """
    return q.dtype != torch.float32


launchers = AttentionLaunchers(
    unsupported,
    _forward,
    _backward,
    worthwhile,
    average_values=average_values,
    gated_average=gated_average,
    values_gradient=values_gradient,
    scores_gradients=scores_gradients,
    variants={"softmax": Launchers(unsupported, softmax_rows, None, worthwhile)},
)
