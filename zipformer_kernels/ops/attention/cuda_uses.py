"""What uses of attention weights have left, as the CUDA kernels of the scores' gradient read it.

Channels of all uses are one product's. Those of a wide use are read where they lie; narrow ones, whose rows are too
short for that, are copied side by side first: ``csrc/attention/cuda_uses.cu``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.core.launch import DTYPE_CODES, call_cuda, pointer
from zipformer_kernels.ops.attention import arguments
from zipformer_kernels.ops.attention.aligned import COPIED, NARROW, whole_groups
from zipformer_kernels.ops.attention.arguments import NO_ROWS, Rows, rows, unit_stride
from zipformer_kernels.ops.attention.scores import Scores, Use

PIECE = 8
"""Channels that kernels copy at a time: rows of a wide use, and those of narrow ones together, have a multiple."""


class Channels(NamedTuple):
    """`AttentionChannels`."""

    v: Rows
    grad: Rows
    channels: int
    values: int
    grads: int
    packed: int
    delta: int


class PackedUse(NamedTuple):
    """`AttentionPackedUse`."""

    use: arguments.Use
    first_head: int
    heads: int
    first: int
    end: int


class Together(NamedTuple):
    """The uses of weights.

    Attributes:
        runs: runs of heads, all of them in order, and the channels of each.
        tensors: what those point to.
    """

    runs: list[tuple[range, Channels]]
    tensors: list[Tensor]


class _Own(NamedTuple):
    """A use with the heads of its own, and its tensors with unit last stride: (S or T, B, heads, C)."""

    heads: range
    values: Tensor
    out: Tensor
    grad: Tensor

    @property
    def channels(self) -> int:
        return self.values.shape[3]

    def packed(self, first: int, end: int) -> PackedUse:
        use = arguments.Use(rows(self.values), rows(self.out), rows(self.grad), self.channels)
        return PackedUse(use, self.heads.start, len(self.heads), first, end)


def bring_together(scores: Scores, uses: Sequence[Use]) -> Together:
    """Copies side by side what is narrow, and sums grad out over the channels of all uses: one launch.

    Args:
        scores: what the weights are made from.
        uses: of heads of the scores.
    """
    q, k = scores.q, scores.k
    (targets, batch, heads, _), sources = q.shape, k.shape[0]
    direct, narrow = _told_apart(q, [use for use in uses if use.values.shape[3] > 0])
    width = whole_groups(sum(use.channels for use in narrow), PIECE)
    options = {"device": q.device}
    delta = (torch.empty if uses else torch.zeros)(heads, batch, targets, dtype=torch.float32, **options)
    values, grads = (
        torch.empty(heads, batch, frames, width, dtype=q.dtype, **options) if width else None
        for frames in (sources, targets)
    )
    packed, first = [use.packed(0, 0) for use in direct], 0
    for use in narrow:
        end = width if use is narrow[-1] else first + use.channels
        packed.append(use.packed(first, end))
        first = end
    if packed:
        pointers, sizes = map(pointer, (values, grads, delta)), (targets, sources, batch, heads, width)
        call_cuda("attention_pack", q, packed, *pointers, *sizes, DTYPE_CODES[q.dtype])
    cuts = sorted({0, heads, *(cut for use in direct for cut in (use.heads.start, use.heads.stop))})
    runs = [range(*cut) for cut in pairwise(cuts)]
    found = [(run, _channels(run, direct, values, grads, delta, width)) for run in runs]
    held = (values, grads, delta, *(x for use in direct for x in (use.values, use.grad)))
    return Together(found, [x for x in held if x is not None])


def _told_apart(q: Tensor, uses: Sequence[Use]) -> tuple[list[_Own], list[_Own]]:
    """Uses that are read where they lie, no two of the same head, and the others."""
    direct, narrow, taken = [], [], set()
    for use in uses:
        own = _Own(range(q.shape[2])[use.heads], *(unit_stride(x.to(q.dtype)) for x in use[1:]))
        wide = own.channels > NARROW and own.channels % PIECE == 0 and _readable(own.values) and _readable(own.grad)
        if wide and taken.isdisjoint(own.heads):
            direct.append(own)
            taken.update(own.heads)
        else:
            narrow.append(own)
    return direct, narrow


def _readable(x: Tensor) -> bool:
    """Whether all rows are aligned as copies of `COPIED` bytes want them, and frames as far apart as 31 bits count."""
    size = x.element_size()
    return (
        x.stride(0) < 1 << 31
        and x.data_ptr() % COPIED == 0
        and all(stride * size % COPIED == 0 for stride in x.stride()[:3])
    )


def _channels(
    run: range, direct: Sequence[_Own], values: Tensor | None, grads: Tensor | None, delta: Tensor, width: int
) -> Channels:
    """Those of a run of heads."""
    size = 0 if values is None else values.element_size()
    own = next((use for use in direct if run.start in use.heads), None)
    of_run = (NO_ROWS, NO_ROWS, 0)
    if own is not None:
        head = run.start - own.heads.start
        of_run = (*(rows(x).from_head(head, x.element_size()) for x in (own.values, own.grad)), own.channels)
    packed = (0 if x is None else pointer(x) + run.start * x.stride(0) * size for x in (values, grads))
    return Channels(*of_run, *packed, width, pointer(delta) + run.start * delta.stride(0) * 4)
