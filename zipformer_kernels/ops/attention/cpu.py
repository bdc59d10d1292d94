"""Shared-weight attention through the compiled module: ``csrc/attention/cpu*.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.joint import empty_beside
from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    INFERENCE_DTYPES,
    call_cpu,
    contiguous,
    few_rows,
    pointer,
    unsupported_dtype,
    unsupported_dtypes,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention.arguments import NO_ROWS, Arguments, Rows, Use, projections, rows, unit_stride
from zipformer_kernels.ops.attention.launchers import AttentionLaunchers
from zipformer_kernels.ops.attention.reference import empty_rows
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, by_heads, grouped
from zipformer_kernels.ops.attention.scores import Use as Left

LEAST_SCORES = tuning.entry("attention.least_scores")
LEAST_SCORES_FLOAT64 = tuning.entry("attention.least_scores_float64")
LEAST_WEIGHTS_BFLOAT16 = tuning.entry("attention.least_weights_bfloat16")


def _softmax(*args: Tensor | int | None) -> tuple[Tensor]:
    scores, _, masks, _ = grouped(0, args)
    softmax = empty_rows(scores.q)
    if softmax.numel() > 0:
        weights = Arguments(scores, softmax, masks.dense())  # holds copies until the call is over
        call_cpu("attention_softmax", scores.q, weights.struct())
    return (softmax,)


def forward(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """Launchers' forward."""
    scores, (v, softmax), masks, _ = grouped(2, args)
    return (average_values(scores, softmax, masks, v),)


def backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | float | None
) -> tuple[Tensor | None, ...]:
    """Launchers' backward. Gradients of p and e are computed together."""
    scores, (v, softmax), masks, penalty = grouped(2, args)
    (out,), (grad,) = saved, grads
    wanted = needs[0], needs[1], needs[2] or needs[3], needs[2] or needs[3], needs[4]
    gradients, written = _room((*scores, v), wanted, out.numel() > 0)
    if out.numel() > 0:
        uses = [(v, out, grad.to(v.dtype))]
        _launch_backward(scores, softmax, None, None, masks, uses, _all_rows(written), penalty)
    return *_filled(gradients, written), None, None, None


def average_values(scores: Scores, softmax: Tensor, masks: Masks, values: Tensor) -> Tensor:
    """W V, (T, B, H, C), with weights made of the scores and the softmax rows."""
    out = values.new_empty(scores.q.shape[0], *values.shape[1:])
    if out.numel() > 0:
        weights, values = Arguments(scores, softmax, masks.dense()), unit_stride(values)
        call_cpu("attention_forward", values, weights.struct(), rows(values), pointer(out), values.shape[3])
    return out


def values_gradient(scores: Scores, softmax: Tensor, masks: Masks, grad: Tensor) -> Tensor:
    """W^T G, (S, B, H, C), with weights made of the scores and the softmax rows."""
    dv = grad.new_empty(scores.k.shape[0], *grad.shape[1:])
    if grad.numel() == 0:
        return dv.zero_()
    if dv.numel() > 0:
        none = [NO_ROWS] * 4
        _launch_backward(scores, softmax, None, None, masks, [(None, None, grad)], [*none, rows(dv)], Penalty())
    return dv


def scores_gradients(
    needs: tuple[bool, ...], scores: Scores, softmax: Tensor, masks: Masks, penalty: Penalty, uses: Sequence[Left]
) -> list[Tensor | None]:
    """The gradients of q, k, p and e from all uses of weights made of the scores and the softmax rows.

    Args:
        needs: which are wanted; those of p and e are computed together.
        scores, softmax, masks, penalty: of all heads.
        uses: of any heads each.
    """
    pieces = [(heads, None, None, own) for heads, own in by_heads(scores.q.shape[2], uses)]
    return _gradients(needs, pieces, scores, softmax, masks, penalty)


def make_weights(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """The forward of the variant ``weights``."""
    scores, _, masks, _ = grouped(0, args)
    q, k, *_ = scores
    w = q.new_empty(q.shape[2], q.shape[1], q.shape[0], k.shape[0])
    if w.numel() > 0:
        weights = Arguments(scores, None, masks.dense())
        call_cpu("attention_weights_forward", q, weights.struct(), pointer(w))
    return (w,)


def weights_gradients(
    needs: tuple[bool, ...],
    pieces: Sequence[tuple[slice, Tensor, Tensor | None, Sequence[tuple[Tensor, Tensor, Tensor]]]],
    scores: Scores,
    masks: Masks,
    penalty: Penalty,
) -> list[Tensor | None]:
    """The gradients of q, k, p and e from those of pieces of W, each dw plus G V^T of every use.

    Args:
        needs: which are wanted; those of p and e are computed together.
        pieces: which heads; W, (H, B, T, S); dw of the same shape, or None; and the uses: values V, (S, B, H, C), their
            average and its gradient G, (T, B, H, C).
        scores, masks, penalty: of all heads.
    """
    return _gradients(needs, pieces, scores, None, masks, penalty)


def _gradients(
    needs: tuple[bool, ...],
    pieces: Sequence[tuple[slice, Tensor | None, Tensor | None, Sequence[tuple[Tensor, Tensor, Tensor]]]],
    scores: Scores,
    softmax: Tensor | None,
    masks: Masks,
    penalty: Penalty,
) -> list[Tensor | None]:
    """As `weights_gradients`; where there is no W, from the softmax rows."""
    wanted = needs[0], needs[1], needs[2] or needs[3], needs[2] or needs[3]
    filled = scores.q.numel() > 0 and scores.k.numel() > 0
    gradients, written = _room(scores, wanted, filled)
    for heads, w, dw, uses in pieces if filled else ():
        results = *_all_rows(Scores(*written).of_heads(heads)), NO_ROWS
        own = None if softmax is None else softmax[heads]
        _launch_backward(scores.of_heads(heads), own, w, dw, masks, uses, results, penalty)
    return _filled(gradients, written)


def _launch_backward(
    scores: Scores,
    softmax: Tensor | None,
    w: Tensor | None,
    dw: Tensor | None,
    masks: Masks,
    uses: Sequence[tuple[Tensor | None, Tensor | None, Tensor]],
    results: Sequence[Rows],
    penalty: Penalty,
) -> None:
    """Calls the kernel; V and O of a use may be None for the gradient of the values alone."""
    dtype, weights = scores.q.dtype, Arguments(scores, softmax, masks.dense())  # holds copies until the call is over
    w, dw = [None if x is None else x.to(dtype).contiguous() for x in (w, dw)]
    uses = [[None if x is None else unit_stride(x.to(dtype)) for x in use] for use in uses]
    given = [Use(*map(rows, use), use[2].shape[3]) for use in uses]
    call_cpu("attention_backward", scores.q, weights.struct(), pointer(w), pointer(dw), given, *results, *penalty)


def _weights_backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | float | None
) -> tuple[Tensor | None, ...]:
    scores, _, masks, penalty = grouped(0, args)
    pieces = [(slice(None), saved[0], grads[0], ())]
    return *weights_gradients(needs, pieces, scores, masks, penalty), None, None


def _room(
    inputs: tuple[Tensor | None, ...], wanted: tuple[bool, ...], filled: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the inputs that are wanted, zeros unless they get `filled`; and tensors that kernels can fill."""
    if filled and all(wanted[:3]) and all(x is not None for x in inputs[:3]):
        gradients = empty_beside(*inputs[:3])
    else:
        gradients = []
    make = torch.empty_like if filled else torch.zeros_like
    for x, want in zip(inputs[len(gradients) :], wanted[len(gradients) :], strict=True):
        gradients.append(make(x) if want and x is not None else None)
    return gradients, [unit_stride(x) for x in gradients]


def _all_rows(written: Sequence[Tensor | None]) -> list[Rows]:
    """The addresses and strides of the gradients of q, k, p, e and, where there is one, v."""
    return [projections(x) if i == 3 else rows(x) for i, x in enumerate(written)]


def _filled(gradients: list[Tensor | None], written: list[Tensor | None]) -> list[Tensor | None]:
    return [x if x is y else x.copy_(y) for x, y in zip(gradients, written, strict=True)]


def unsupported(
    q: Tensor, k: Tensor, p: Tensor | None, e: Tensor | None, *rest: Tensor | int | float | None
) -> str | None:
    """Why the kernels cannot take these arguments, or None if they can."""
    values = [x for x in rest if isinstance(x, Tensor) and x.is_floating_point()][:-1]  # the last are softmax rows
    dtypes = [x.dtype for x in (q, k, p, e, *values) if x is not None]
    if len(set(dtypes)) > 1:
        return f"it takes tensors of one dtype, got {', '.join(map(str, dtypes))}"
    return unsupported_dtype(q, CPU_DTYPES)


def worthwhile(q: Tensor, k: Tensor, *rest: object) -> bool:
    """Whether a call is large enough. Below, dense weights lie in cache, where torch's products are as fast.

    Without gradients it always is: one kernel makes the weights faster than five functions of torch.
    """
    if not torch.is_grad_enabled() and q.dtype in INFERENCE_DTYPES:
        return True
    scores = q.shape[0] * k.shape[0]
    if q.dtype == torch.bfloat16:
        return scores * q.shape[1] * q.shape[2] >= LEAST_WEIGHTS_BFLOAT16.value
    least = LEAST_SCORES_FLOAT64 if q.dtype == torch.float64 else LEAST_SCORES
    return scores >= least.value


def average(weights: Tensor, values: Tensor) -> Tensor:
    """W V by the products of torch, without gradients: weights (H, B, T, S), values (S, B, H * C) -> (T, B, H * C).

    Raises:
        ValueError: the values do not fit the weights.
    """
    heads, batch, _, sources = weights.shape
    if values.shape[:2] != (sources, batch):
        raise ValueError(f"values must be of {sources} frames and {batch} sequences, got {tuple(values.shape)}")
    by_head = values.unflatten(2, (heads, -1)).permute(2, 1, 0, 3)
    return (weights @ by_head).permute(2, 1, 0, 3).flatten(2)


def _stream(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, gated = args
    src, in_weight, in_bias, context, weights, *after = contiguous(*tensors)
    targets, batch, channels = src.shape
    heads, _, _, sources = weights.shape
    values = context.shape[2]
    y, joined = torch.empty_like(src), src.new_empty(sources, batch, values)
    if y.numel() == 0:
        joined[: context.shape[0]].copy_(context)
        return y, joined
    call_cpu(
        "average_branch",
        src,
        *map(pointer, (src, in_weight, in_bias, *after, y)),
        channels,
        DTYPE_CODES[src.dtype],
        targets=targets,
        sources=sources,
        sequences=batch,
        heads=heads,
        values=values,
        gated=gated,
        context=pointer(context),
        weights=pointer(weights),
        joined=pointer(joined),
    )
    return y, joined


launchers = AttentionLaunchers(
    unsupported,
    forward,
    backward,
    worthwhile,
    average_values=average_values,
    values_gradient=values_gradient,
    scores_gradients=scores_gradients,
    make_weights=make_weights,
    weights_gradients=weights_gradients,
    variants={
        "softmax": Launchers(unsupported, _softmax, None, worthwhile),
        "weights": Launchers(unsupported, make_weights, _weights_backward),
        "stream": Launchers(
            supports=lambda *args: unsupported_dtypes(args[:-1], INFERENCE_DTYPES),
            forward=_stream,
            backward=None,
            worthwhile=lambda src, *_: few_rows(src),
        ),
    },
)
