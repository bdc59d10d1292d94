"""Arguments of attention in the layouts that its Triton kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import cdiv, next_power_of_2, on_device
from zipformer_kernels.ops.attention import kernels
from zipformer_kernels.ops.attention.scores import Masks, Scores
from zipformer_kernels.ops.attention.tiles import Tile, tile_of

FRONT = BACK = 256  # rows of zeros around a table of e: twice what a tile may have of targets or sources
TABLE_ROWS = tuning.entry("attention.triton_table_rows")


@dataclass(frozen=True)
class Table:
    """e as `kernels.add_term` reads it, or none.

    Attributes:
        data: (H, copies, rows, P_TILE), or any tensor where there is no positional term.
        lead: the row of offset T, in sixteens.
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
        """Elements from one copy to the next, in sixteens."""
        return self.data.shape[2] * self.tile // 16 if self.channels else 0


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
    lead = cdiv(FRONT + targets, 16)
    rows = cdiv(16 * lead + sources + BACK, 16) * 16
    data = e.new_empty(heads, copies, rows, tile)
    with on_device(e):
        kernels.spread_kernel[(cdiv(rows, TABLE_ROWS.value), heads)](
            *(e, *e.stride(), data, offsets, rows, 16 * lead - targets),
            P=channels,
            P_TILE=tile,
            COPIES=copies,
            ROWS=TABLE_ROWS.value,
        )
    return Table(data, lead, term, channels, tile)


@dataclass(frozen=True)
class Weights:
    """The weights' side of every kernel's arguments.

    Attributes:
        q, k: with unit last stride.
        p: with P_TILE channels and strides that are multiples of 4; or None.
        table: of e.
        softmax: the rows that make weights of scores, or any tensor.
        masks: as bytes, that for pairs with unit last stride.
    """

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

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel that makes scores. Positions by gather take more registers, and have a tile."""
        return tile_of("gather" if self.table.term == kernels.BY_GATHER.value else kernel, self.q.dtype)

    def arguments(self) -> tuple:
        """The positional arguments that kernels which make scores begin with."""
        q, k, (padding, mask, chunk, left_chunks) = self.q, self.k, self.masks
        p = q if self.p is None else self.p
        mask_strides = (0, 0) if mask is None else (mask.stride(0) if mask.ndim == 3 else 0, mask.stride(-2))
        return (
            *(q, *q.stride()[:3], k, *k.stride()[:3], p, *strides_of(p)),
            *(self.table.data, self.softmax),
            *((q, 0, 0) if padding is None else (padding, *padding.stride())),
            *(q if mask is None else mask, *mask_strides),
            *(self.targets, self.sources, self.sequences, self.heads),
            *(chunk, left_chunks if left_chunks >= 0 else 2**30, self.table.lead, self.table.copy),
        )

    def constants(self) -> dict[str, int | bool]:
        """The constants that these kernels take."""
        return {
            "D": self.q.shape[3],
            "D_TILE": max(16, next_power_of_2(self.q.shape[3])),
            "P_TILE": self.table.tile,
            "TERM": self.table.term,
            "PADDING": self.masks.key_padding_mask is not None,
            "MASK": self.masks.attn_mask is not None,
            "CHUNKS": self.masks.chunk > 0,
        }


def unit_stride(x: Tensor) -> Tensor:
    """x if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides_of(p: Tensor) -> tuple[int, ...]:
    """The strides of positions in fours, as kernels take them: so the compiler sees that they are aligned."""
    return tuple(stride // 4 for stride in p.stride()[:3])


def weights_of(scores: Scores, softmax: Tensor | None, masks: Masks) -> Weights:
    """Brings an op's arguments into the layouts that the kernels take."""
    q, k, p, e = scores
    padding, mask, *rule = masks
    if p is None or p.shape[3] == 0:
        p, table = None, Table(q)
    else:
        table = table_of(e, q.shape[0], k.shape[0])
        p = positions_of(p, table.tile)
    mask = None if mask is None else unit_stride(mask).view(torch.uint8)
    padding = None if padding is None else padding.view(torch.uint8)
    q, softmax = unit_stride(q), q if softmax is None else softmax.contiguous()
    return Weights(q, unit_stride(k), p, table, softmax, Masks(padding, mask, *rule))


def positions_of(p: Tensor, tile: int) -> Tensor:
    """p with `tile` channels, zeros behind its own, and strides that are multiples of 4."""
    tile = max(tile, 4)
    if p.shape[3] == tile and p.stride(3) == 1 and all(stride % 4 == 0 for stride in p.stride()[:3]):
        return p
    return F.pad(p, (0, tile - p.shape[3])).contiguous()
