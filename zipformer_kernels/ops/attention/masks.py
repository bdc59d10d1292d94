"""The rule of chunk-causal masks, and the checks of what attention weights are made from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zipformer_kernels.ops.attention import reference
from zipformer_kernels.ops.attention.scores import Masks, Scores
from zipformer_kernels.ops.shapes import as_mask


@dataclass(frozen=True)
class ChunkMask:
    """The rule of chunk-causal attention: a target sees its own chunk and some to its left, none to its right.

    Attributes:
        chunk: frames per chunk.
        left_chunks: chunks to the left that a target sees; negative: all of them.
    """

    chunk: int
    left_chunks: int = -1

    def downsample(self, factor: int) -> ChunkMask:
        """The rule at a frame rate lower by `factor`, which must divide `chunk`."""
        if self.chunk % factor != 0:
            raise ValueError(f"chunk must be a multiple of the downsampling factor {factor}, got {self.chunk}")
        return replace(self, chunk=self.chunk // factor)

    def masks(self, key_padding_mask: Tensor | None = None) -> Masks:
        """The rule, and a padding mask, as ops take them."""
        return Masks(key_padding_mask, None, self.chunk, self.left_chunks)

    def materialize(self, frames: int, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor (frames, frames), True where attention is forbidden."""
        shape = torch.Size((1, frames, frames))
        return reference.forbidden(shape, self.masks(), torch.device(device or "cpu"))[0]


def downsample_mask(mask: Tensor | ChunkMask | None, factor: int) -> Tensor | ChunkMask | None:
    """The mask at a frame rate lower by `factor`: every factor-th row and column, or the rule of that."""
    if isinstance(mask, ChunkMask):
        return mask.downsample(factor)
    return None if mask is None else mask[..., ::factor, ::factor]


def checked(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    e: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | ChunkMask | None,
) -> tuple[Scores, Masks]:
    """The arguments of `AttentionWeights` as ops take them. Raises as that does."""
    targets, batch, heads = q.shape[:3]
    sources = k.shape[0]
    key_padding_mask = as_mask("key_padding_mask", key_padding_mask)
    wanted: dict[str, tuple[Tensor | None, tuple[tuple[int, ...], ...]]] = {
        "k": (k, ((sources, batch, heads, q.shape[3]),)),
        "p": (p, ((targets, batch, heads, 0 if p is None else p.shape[-1]),)),
        "e": (
            e,
            (
                (max(targets + sources - 1, 0), heads, 0 if p is None else p.shape[-1]),
                (batch, max(targets + sources - 1, 0), heads, 0 if p is None else p.shape[-1]),
            ),
        ),
        "key_padding_mask": (key_padding_mask, ((batch, sources),)),
        "attn_mask": (
            None if isinstance(attn_mask, ChunkMask) else attn_mask,
            ((targets, sources), (batch, targets, sources)),
        ),
    }
    if (p is None) != (e is None):
        raise ValueError("p and e must be given together")
    for name, (x, shapes) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{name} must be of shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
        if name == "attn_mask" and x.dtype != torch.bool:
            raise TypeError(f"{name} must be of dtype bool, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {x.device}")
    if isinstance(attn_mask, ChunkMask) and targets != sources:
        raise ValueError(f"attn_mask: a ChunkMask needs as many sources as targets, got {sources} and {targets}")
    masks = (
        attn_mask.masks(key_padding_mask) if isinstance(attn_mask, ChunkMask) else Masks(key_padding_mask, attn_mask)
    )
    return Scores(q, k, p, e), masks
