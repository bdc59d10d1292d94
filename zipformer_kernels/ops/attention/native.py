"""Shared-weight attention through the compiled module: ``csrc/attention/cpu*.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.core.joint import empty_beside
from zipformer_kernels.core.launch import (
    CPU_DTYPES,
    DTYPE_CODES,
    INFERENCE_DTYPES,
    call_cpu,
    pointer,
    unsupported_dtype,
)
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention.reference import empty_rows


class Rows(NamedTuple):
    """`AttentionRows` of ``csrc/attention/attention.h``: address and strides of a tensor (frames, B, H, channels)."""

    data: int
    frame: int
    sequence: int
    head: int


NO_ROWS = Rows(0, 0, 0, 0)


class Weights(NamedTuple):
    """`AttentionWeights` of ``csrc/attention/attention.h``."""

    q: Rows
    k: Rows
    p: Rows
    e: Rows
    softmax: int
    padding: int
    mask: int
    mask_frame: int
    mask_sequence: int
    targets: int
    sources: int
    sequences: int
    heads: int
    query_channels: int
    position_channels: int
    chunk: int
    left_chunks: int
    dtype: int


class Use(NamedTuple):
    """`AttentionUse` of ``csrc/attention/attention.h``."""

    v: Rows
    out: Rows
    grad: Rows
    channels: int


LEAST_SCORES = {torch.float32: 64 * 64, torch.float16: 64 * 64, torch.float64: 100 * 100}
"""Targets times sources from which on a layer with three uses of its weights measured faster than on eager."""

LEAST_WEIGHTS_BFLOAT16 = 1 << 24
"""Elements of the weights from which on eager loses in bfloat16, for which processors may have instructions."""

KEPT_BYTES = 32 << 20
"""Size of the weights of all heads but the first, which may lie apart, below which they are kept: to read them again is
faster than to compute them again, but not in memory that allocators hand back to the system, as glibc's does from this
size on."""


def _unit_stride(x: Tensor | None) -> Tensor | None:
    """x if its last dimension is contiguous, else a copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(x: Tensor | None) -> Rows:
    return NO_ROWS if x is None else Rows(pointer(x), *x.stride()[:3])


def _projections(e: Tensor | None) -> Rows:
    """The address and strides of position projections, by offset, sequence and head; 0 if sequences share them."""
    if e is None:
        return NO_ROWS
    offset, head = e.stride()[-3:-1]
    return Rows(pointer(e), offset, e.stride(0) if e.ndim == 4 else 0, head)


class _Weights:
    """The weights' side of every call, with the tensors that it points to."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        p: Tensor | None,
        e: Tensor | None,
        softmax: Tensor | None,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        chunk: int,
        left_chunks: int,
    ) -> None:
        self.q, self.k, self.p, self.e = (_unit_stride(x) for x in (q, k, p, e))
        self.softmax = None if softmax is None else softmax.contiguous()  # not read where W itself is given
        self.padding = None if key_padding_mask is None else key_padding_mask.contiguous()
        self.mask = _unit_stride(attn_mask)
        self.rule = chunk, left_chunks

    def arguments(self) -> Weights:
        """What every function of the compiled module takes first."""
        q, k, p, mask = self.q, self.k, self.p, self.mask
        scores = _rows(q), _rows(k), _rows(p), _projections(self.e)
        strides = (0, 0) if mask is None else (mask.stride(-2), mask.stride(0) if mask.ndim == 3 else 0)
        masks = pointer(self.padding), pointer(mask), *strides
        sizes = (q.shape[0], k.shape[0], *q.shape[1:], 0 if p is None else p.shape[3], *self.rule)
        return Weights(*scores, pointer(self.softmax), *masks, *sizes, DTYPE_CODES[q.dtype])


def _softmax(*args: Tensor | int | None) -> tuple[Tensor]:
    q, k, p, e, *masks = args
    softmax = empty_rows(q)
    if softmax.numel() > 0:
        weights = _Weights(q, k, p, e, softmax, *masks)  # keeps copies alive until the call is over
        call_cpu("attention_softmax", q, weights.arguments())
    return (softmax,)


def forward(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """Launchers' forward."""
    q, k, p, e, v, softmax, *masks, _, _ = args
    out = v.new_empty(q.shape[0], *v.shape[1:])
    if out.numel() > 0:
        weights = _Weights(q, k, p, e, softmax, *masks)
        v = _unit_stride(v)
        call_cpu("attention_forward", v, weights.arguments(), _rows(v), pointer(out), v.shape[3])
    return (out,)


def backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | float | None
) -> tuple[Tensor | None, ...]:
    """Launchers' backward. Gradients of p and e are computed together."""
    q, k, p, e, v, softmax, *masks, penalty, limit = args
    (out,), (grad,) = saved, grads
    wanted = needs[0], needs[1], needs[2] or needs[3], needs[2] or needs[3], needs[4]
    gradients, written = _room((q, k, p, e, v), wanted, out.numel() > 0)
    if out.numel() > 0:
        weights = _Weights(q, k, p, e, softmax, *masks)
        v, out, grad = (_unit_stride(x) for x in (v, out, grad.to(v.dtype)))
        use = Use(_rows(v), _rows(out), _rows(grad), v.shape[3])
        call_cpu("attention_backward", v, weights.arguments(), 0, 0, [use], *_all_rows(written), penalty, limit)
    return *_filled(gradients, written), None, None, None


def make_weights(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """The forward of ``attention_weights``."""
    q, k, p, e, *masks, _, _ = args
    w = q.new_empty(q.shape[2], q.shape[1], q.shape[0], k.shape[0])
    if w.numel() > 0:
        weights = _Weights(q, k, p, e, None, *masks)
        call_cpu("attention_weights_forward", q, weights.arguments(), pointer(w))
    return (w,)


def weights_gradients(
    needs: tuple[bool, ...],
    pieces: Sequence[tuple[slice, Tensor, Tensor | None, Sequence[tuple[Tensor, Tensor, Tensor]]]],
    *args: Tensor | int | float | None,
) -> list[Tensor | None]:
    """The gradients of q, k, p and e from those of pieces of W, each dw plus G V^T of every use.

    Args:
        needs: which are wanted; those of p and e are computed together.
        pieces: which heads; W, (H, B, T, S); dw of the same shape, or None; and the uses: values V, (S, B, H, C), their
            average and its gradient G, (T, B, H, C).
        args: of the op ``attention_weights``, of all heads.
    """
    q, k, p, e, *masks, penalty, limit = args
    wanted = needs[0], needs[1], needs[2] or needs[3], needs[2] or needs[3]
    filled = q.numel() > 0 and k.numel() > 0
    gradients, written = _room((q, k, p, e), wanted, filled)
    for heads, w, dw, uses in pieces if filled else ():
        weights, w = _Weights(*of_heads(heads, q, k, p, e), None, *masks), w.contiguous()
        dw = None if dw is None else dw.to(w.dtype).contiguous()
        uses = [tuple(_unit_stride(x.to(w.dtype)) for x in use) for use in uses]
        given = [Use(*map(_rows, use), use[0].shape[3]) for use in uses]
        results = *_all_rows(of_heads(heads, *written)), NO_ROWS
        tensors = pointer(w), pointer(dw), given
        call_cpu("attention_backward", q, weights.arguments(), *tensors, *results, penalty, limit)
    return _filled(gradients, written)


def of_heads(
    heads: slice, q: Tensor | None, k: Tensor | None, p: Tensor | None, e: Tensor | None
) -> list[Tensor | None]:
    """Some heads of the four."""
    if heads == slice(None):
        return [q, k, p, e]
    by_head = [None if x is None else x[:, :, heads] for x in (q, k, p)]
    return [*by_head, None if e is None else e[..., heads, :]]


def _weights_backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | float | None
) -> tuple[Tensor | None, ...]:
    return *weights_gradients(needs, [(slice(None), saved[0], grads[0], ())], *args), None, None


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


def keeps_weights(heads: int, batch: int, targets: int, sources: int, dtype: torch.dtype) -> bool:
    """Whether weights of this shape are small enough to keep."""
    return heads * batch * targets * sources * dtype.itemsize < KEPT_BYTES


cpu = Launchers(unsupported, forward, backward, worthwhile)
cpu_softmax = Launchers(unsupported, _softmax, None, worthwhile)
cpu_weights = Launchers(unsupported, make_weights, _weights_backward)
