"""The arguments of attention as the compiled module takes them: ``csrc/attention/attention.h``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zipformer_kernels.core.launch import DTYPE_CODES, pointer
from zipformer_kernels.ops.attention.scores import Masks, Scores


class Rows(NamedTuple):
    """`AttentionRows`: address and strides of a tensor (frames, B, H, channels)."""

    data: int
    frame: int
    sequence: int
    head: int

    def from_head(self, head: int, size: int) -> Rows:
        """Those from a head on, of elements of so many bytes."""
        return self._replace(data=self.data + head * self.head * size) if head and self.data else self


NO_ROWS = Rows(0, 0, 0, 0)


class Weights(NamedTuple):
    """`AttentionWeights`."""

    q: Rows
    k: Rows
    p: Rows
    e: Rows
    softmax: int
    padding: int
    padding_frame: int
    padding_sequence: int
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

    def of_heads(self, heads: range, size: int) -> Weights:
        """Those of some heads; q, k, p and e have elements of so many bytes."""
        if len(heads) == self.heads:
            return self
        scores = {name: getattr(self, name).from_head(heads.start, size) for name in ("q", "k", "p", "e")}
        softmax = self.softmax + heads.start * self.sequences * self.targets * 8
        return self._replace(**scores, softmax=softmax, heads=len(heads))


class Use(NamedTuple):
    """`AttentionUse`."""

    v: Rows
    out: Rows
    grad: Rows
    channels: int


def unit_stride(x: Tensor | None) -> Tensor | None:
    """x if its last dimension is contiguous, else a copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: Tensor | None) -> Rows:
    """The address and strides of a tensor (frames, B, H, channels)."""
    return NO_ROWS if x is None else Rows(pointer(x), *x.stride()[:3])


def projections(e: Tensor | None) -> Rows:
    """The address and strides of position projections, by offset, sequence and head; 0 if sequences share them."""
    if e is None:
        return NO_ROWS
    offset, head = e.stride()[-3:-1]
    return Rows(pointer(e), offset, e.stride(0) if e.ndim == 4 else 0, head)


class Arguments:
    """The weights' side of every call, with the tensors that it points to.

    Args:
        scores: q, k, p, e.
        softmax: the softmax rows; None where W itself is given.
        masks: the masks.
    """

    def __init__(self, scores: Scores, softmax: Tensor | None, masks: Masks) -> None:
        self.q, self.k, self.p, self.e = (unit_stride(x) for x in scores)
        self.softmax = None if softmax is None else softmax.contiguous()
        self.padding = masks.key_padding_mask
        self.mask = unit_stride(masks.attn_mask)
        self.rule = masks.chunk, masks.left_chunks

    def struct(self) -> Weights:
        """What every function of the compiled module takes first."""
        q, k, p, padding, mask = self.q, self.k, self.p, self.padding, self.mask
        scores = rows(q), rows(k), rows(p), projections(self.e)
        strides = (0, 0) if mask is None else (mask.stride(-2), mask.stride(0) if mask.ndim == 3 else 0)
        padded = (0, 0, 0) if padding is None else (pointer(padding), padding.stride(1), padding.stride(0))
        masks = *padded, pointer(mask), *strides
        sizes = (q.shape[0], k.shape[0], *q.shape[1:], 0 if p is None else p.shape[3], *self.rule)
        return Weights(*scores, pointer(self.softmax), *masks, *sizes, DTYPE_CODES[q.dtype])
