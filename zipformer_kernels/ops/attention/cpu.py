"""Shared-weight attention through the compiled module: ``csrc/attention/cpu*.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
from zipformer_kernels.ops.attention.reference import empty_rows
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, grouped

Rows = tuple[int, int, int, int]

LEAST_SCORES = {torch.float32: 64 * 64, torch.float16: 64 * 64, torch.float64: 100 * 100}
"""Targets times sources from which on a layer with three uses of its weights measured faster than on eager."""

LEAST_WEIGHTS_BFLOAT16 = 1 << 24
"""Elements of the weights from which on eager loses in bfloat16, for which processors may have instructions."""

STORED_BYTES = 32 << 20
"""Size of the weights of all heads but the first, which may lie apart, below which they are stored: to read them again
is faster than to compute them again, but not in memory that allocators hand back to the system, as glibc's does from
this size on."""


def _unit_stride(x: Tensor | None) -> Tensor | None:
    """x if its last dimension is contiguous, else a copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(x: Tensor | None) -> Rows:
    """The address and strides of a tensor (frames, B, H, channels)."""
    return (0, 0, 0, 0) if x is None else (pointer(x), *x.stride()[:3])


def _projections(e: Tensor | None) -> Rows:
    """The address and strides of position projections, by offset, sequence and head; 0 if sequences share them."""
    if e is None:
        return (0, 0, 0, 0)
    offset, head = e.stride()[-3:-1]
    return pointer(e), offset, e.stride(0) if e.ndim == 4 else 0, head


class _Weights:
    """The weights' side of every call, with the tensors that it points to."""

    def __init__(self, scores: Scores, result: Tensor, masks: Masks) -> None:
        self.q, self.k, self.p, self.e = (_unit_stride(x) for x in scores)
        self.result = result.contiguous()  # the softmax rows, or the weights themselves
        self.padding = None if masks.key_padding_mask is None else masks.key_padding_mask.contiguous()
        self.mask = _unit_stride(masks.attn_mask)
        self.rule = masks.chunk, masks.left_chunks

    def arguments(self) -> tuple:
        """What every function of the compiled module takes first."""
        q, k, p, mask = self.q, self.k, self.p, self.mask
        scores = _rows(q), _rows(k), _rows(p), _projections(self.e)
        masks = pointer(self.padding), pointer(mask)
        strides = (0, 0) if mask is None else (mask.stride(-2), mask.stride(0) if mask.ndim == 3 else 0)
        sizes = (q.shape[0], k.shape[0], *q.shape[1:], 0 if p is None else p.shape[3], *self.rule)
        return scores, pointer(self.result), (*masks, *strides), sizes, DTYPE_CODES[q.dtype]


def _softmax(*args: Tensor | int | None) -> tuple[Tensor]:
    scores, _, masks, _ = grouped(0, args)
    softmax = empty_rows(scores.q)
    if softmax.numel() > 0:
        weights = _Weights(scores, softmax, masks)  # holds copies until the call is over
        call_cpu("attention_softmax", scores.q, *weights.arguments())
    return (softmax,)


def forward(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """Launchers' forward."""
    scores, (v, softmax), masks, _ = grouped(2, args)
    out = v.new_empty(scores.q.shape[0], *v.shape[1:])
    if out.numel() > 0:
        weights = _Weights(scores, softmax, masks)
        v = _unit_stride(v)
        call_cpu("attention_forward", v, *weights.arguments(), _rows(v), pointer(out), v.shape[3])
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
        weights = _Weights(scores, softmax, masks)
        v, out, grad = (_unit_stride(x) for x in (v, out, grad.to(v.dtype)))
        use = _rows(v), _rows(out), _rows(grad), v.shape[3]
        call_cpu("attention_backward", v, *weights.arguments(), use, _all_rows(written), *penalty)
    return *_filled(gradients, written), None, None, None


def make_weights(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """The forward of the variant ``weights``."""
    scores, _, masks, _ = grouped(0, args)
    q, k, *_ = scores
    w = q.new_empty(q.shape[2], q.shape[1], q.shape[0], k.shape[0])
    if w.numel() > 0:
        weights = _Weights(scores, w, masks)
        call_cpu("attention_weights_forward", q, *weights.arguments())
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
        weights = _Weights(scores.of_heads(heads), w, masks)
        dw = None if dw is None else dw.to(w.dtype).contiguous()
        uses = [tuple(_unit_stride(x.to(w.dtype)) for x in use) for use in uses]
        given = [(*map(_rows, use), use[0].shape[3]) for use in uses]
        results = _all_rows(Scores(*written).of_heads(heads))
        call_cpu("attention_weights_backward", w, *weights.arguments(), pointer(dw), given, results, *penalty)
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
    return gradients, [_unit_stride(x) for x in gradients]


def _all_rows(written: Sequence[Tensor | None]) -> list[Rows]:
    """The addresses and strides of the gradients of q, k, p, e and, where there is one, v."""
    return [_projections(x) if i == 3 else _rows(x) for i, x in enumerate(written)]


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
        return scores * q.shape[1] * q.shape[2] >= LEAST_WEIGHTS_BFLOAT16
    return scores >= LEAST_SCORES[q.dtype]


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
    return heads * batch * targets * sources * dtype.itemsize < STORED_BYTES


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
    addresses = tuple(map(pointer, (src, in_weight, in_bias, context, weights, *after, joined, y)))
    sizes = targets, sources, batch, channels, heads, values
    call_cpu("attention_stream", src, addresses, sizes, gated, DTYPE_CODES[src.dtype])
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
