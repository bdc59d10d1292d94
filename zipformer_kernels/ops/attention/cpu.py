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
from zipformer_kernels.ops.attention.reference import empty_rows
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, grouped

LEAST_SCORES = tuning.entry("attention.least_scores")
LEAST_SCORES_FLOAT64 = tuning.entry("attention.least_scores_float64")
LEAST_WEIGHTS_BFLOAT16 = tuning.entry("attention.least_weights_bfloat16")
STORED_BYTES = tuning.entry("attention.stored_bytes")


def _softmax(*args: Tensor | int | None) -> tuple[Tensor]:
    scores, _, masks, _ = grouped(0, args)
    softmax = empty_rows(scores.q)
    if softmax.numel() > 0:
        weights = Arguments(scores, softmax, masks)  # holds copies until the call is over
        call_cpu("attention_softmax", scores.q, weights.struct())
    return (softmax,)


def forward(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """Launchers' forward."""
    scores, (v, softmax), masks, _ = grouped(2, args)
    out = v.new_empty(scores.q.shape[0], *v.shape[1:])
    if out.numel() > 0:
        weights = Arguments(scores, softmax, masks)
        v = unit_stride(v)
        call_cpu("attention_forward", v, weights.struct(), rows(v), pointer(out), v.shape[3])
    return (out,)


def backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | float | None
) -> tuple[Tensor | None, ...]:
    """Launchers' backward. Gradients of p and e are computed together."""
    scores, (v, softmax), masks, penalty = grouped(2, args)
    (out,), (grad,) = saved, grads
    wanted = needs[0], needs[1], needs[2] or needs[3], needs[2] or needs[3], needs[4]
    gradients, written = _room((*scores, v), wanted, out.numel() > 0)
    if out.numel() > 0:
        weights = Arguments(scores, softmax, masks)
        v, out, grad = (unit_stride(x) for x in (v, out, grad.to(v.dtype)))
        use = Use(rows(v), rows(out), rows(grad), v.shape[3])
        call_cpu("attention_backward", v, weights.struct(), 0, 0, [use], *_all_rows(written), *penalty)
    return *_filled(gradients, written), None, None, None


def make_weights(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """The forward of the variant ``weights``."""
    scores, _, masks, _ = grouped(0, args)
    q, k, *_ = scores
    w = q.new_empty(q.shape[2], q.shape[1], q.shape[0], k.shape[0])
    if w.numel() > 0:
        weights = Arguments(scores, None, masks)
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
    wanted = needs[0], needs[1], needs[2] or needs[3], needs[2] or needs[3]
    filled = scores.q.numel() > 0 and scores.k.numel() > 0
    gradients, written = _room(scores, wanted, filled)
    for heads, w, dw, uses in pieces if filled else ():
        weights, w = Arguments(scores.of_heads(heads), None, masks), w.contiguous()
        dw = None if dw is None else dw.to(w.dtype).contiguous()
        uses = [tuple(unit_stride(x.to(w.dtype)) for x in use) for use in uses]
        given = [Use(*map(rows, use), use[0].shape[3]) for use in uses]
        results = *_all_rows(Scores(*written).of_heads(heads)), NO_ROWS
        call_cpu("attention_backward", w, weights.struct(), pointer(w), pointer(dw), given, *results, *penalty)
    return _filled(gradients, written)


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


def stores(heads: int, batch: int, targets: int, sources: int, dtype: torch.dtype) -> bool:
    """Whether weights of this shape are small enough to be stored whole on the CPU."""
    return heads * batch * targets * sources * dtype.itemsize < STORED_BYTES.value


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


launchers = Launchers(
    unsupported,
    forward,
    backward,
    worthwhile,
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
