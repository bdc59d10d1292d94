"""Arguments of attention in the layouts that its Triton kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.core.launch import cdiv, next_power_of_2, on_device
from zipformer_kernels.ops.attention import kernels
from zipformer_kernels.ops.attention.scores import Masks, Scores

FRONT = BACK = 256  # rows of zeros around a table of e: twice what a tile may have of targets or sources
SPREAD_ROWS = 128  # of a table, that one program writes


@dataclass(frozen=True)
class Table:
    """e as `kernels.add_term` reads it, or none.

    Attributes:
        data: (H, copies, rows, P_TILE), or any tensor where there is no positional term.
        lead: the row of offset T.
        term: how the term is computed, see kernels.py.
        channels: P.
        tile: P_TILE.
    """

    data: Tensor
    lead: int = 0
    term: int = kernels.NO_TERM.value
    channels: int = 0
    tile: int = 1

    @property
    def copy(self) -> int:
        """Elements from one copy to the next."""
        return self.data.shape[2] * self.tile if self.channels else 0


def table_of(e: Tensor, targets: int, sources: int) -> Table:
    """The table of e, (T + S - 1, H, P)."""
    offsets, heads, channels = e.shape
    if channels > 8:
        term, tile, copies = kernels.BY_GATHER.value, max(16, next_power_of_2(channels)), 1
    elif e.dtype == torch.float32:
        term, tile, copies = kernels.BY_LOADS.value, next_power_of_2(channels), 1
    else:
        tile = 4 if channels <= 4 else 8
        term, copies = kernels.BY_SLOTS.value, 8 // tile
    lead = cdiv(FRONT + targets, 16) * 16
    rows = cdiv(lead + sources + BACK, 16) * 16
    data = e.new_empty(heads, copies, rows, tile)
    with on_device(e):
        kernels.spread_kernel[(cdiv(rows, SPREAD_ROWS), heads)](
            *(e, *e.stride(), data, offsets, rows, lead - targets),
            P=channels,
            P_TILE=tile,
            COPIES=copies,
            ROWS=SPREAD_ROWS,
        )
    return Table(data, lead, term, channels, tile)


@dataclass(frozen=True)
class Weights:
    """The weights' side of every kernel's arguments: tensors with unit last stride, masks as bytes, sizes."""

    q: Tensor
    k: Tensor
    p: Tensor | None
    table: Table
    softmax: Tensor
    masks: Masks

    @property
    def targets(self) -> int:
        return self.q.shape[0]

    @property
    def sources(self) -> int:
        return self.k.shape[0]

    @property
    def sequences(self) -> int:
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    def programs(self, rows: int, tile: int) -> int:
        """How many programs share out so many rows of every sequence and head."""
        return cdiv(rows, tile) * self.sequences * self.heads

    def arguments(self) -> tuple:
        """The positional arguments that kernels which make scores begin with."""
        q, k, (padding, mask, chunk, left_chunks) = self.q, self.k, self.masks
        p = q if self.p is None else self.p
        mask_strides = (0, 0) if mask is None else (mask.stride(0) if mask.ndim == 3 else 0, mask.stride(-2))
        return (
            *(q, *q.stride()[:3], k, *k.stride()[:3], p, *p.stride()[:3]),
            *(self.table.data, self.softmax),
            *(q if padding is None else padding, q if mask is None else mask),
            *(*mask_strides, self.targets, self.sources, self.sequences, self.heads),
            *(chunk, left_chunks if left_chunks >= 0 else 2**30, self.table.lead, self.table.copy),
        )

    def constants(self) -> dict[str, int | bool]:
        """The constants that these kernels take."""
        return {
            "D": self.q.shape[3],
            "D_TILE": max(16, next_power_of_2(self.q.shape[3])),
            "P": 0 if self.p is None else self.p.shape[3],
            "P_TILE": self.table.tile,
            "TERM": self.table.term,
            "PADDING": self.masks.key_padding_mask is not None,
            "MASK": self.masks.attn_mask is not None,
            "CHUNKS": self.masks.chunk > 0,
        }


def unit_stride(x: Tensor) -> Tensor:
    """x if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def weights_of(scores: Scores, softmax: Tensor | None, masks: Masks) -> Weights:
    """Brings an op's arguments into the layouts that the kernels take."""
    q, k, p, e = scores
    padding, mask, *rule = masks
    as_bytes = (
        None if padding is None else padding.contiguous().view(torch.uint8),
        None if mask is None else unit_stride(mask).view(torch.uint8),
    )
    if p is None or p.shape[3] == 0:
        p, table = None, Table(q)
    else:
        table = table_of(e, q.shape[0], k.shape[0])
        slots = table.term == kernels.BY_SLOTS.value and p.shape[3] < table.tile
        p = F.pad(p, (0, table.tile - p.shape[3])) if slots else unit_stride(p)
    q, softmax = unit_stride(q), q if softmax is None else softmax.contiguous()
    return Weights(q, unit_stride(k), p, table, softmax, Masks(*as_bytes, *rule))
