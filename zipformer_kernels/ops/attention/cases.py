"""Shapes that shared-weight attention is tested and measured on: self-attention at 30 s, and awkward ones."""

from __future__ import annotations

from functools import partial

import torch

from zipformer_kernels.ops import attention
from zipformer_kernels.ops.cases import BATCH, Case, leaf, stacks

PENALTY_LIMIT = 4.0


def weights_inputs(
    targets: int,
    sources: int,
    batch: int,
    heads: int,
    query: int,
    position: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[torch.Tensor, ...]:
    """q, k, p as views of one projection, as the module makes them, and e; scores of a few units."""
    scale = query**-0.25
    projected = leaf(targets, batch, heads * (2 * query + position), dtype=dtype, device=device, scale=scale).detach()
    q, k, p = projected.split([heads * query, heads * query, heads * position], dim=2)
    if sources != targets:
        k = leaf(sources, batch, heads * query, dtype=dtype, device=device, scale=scale).detach()
    e = leaf(targets + sources - 1, heads, position, dtype=dtype, device=device)
    parts = (x.unflatten(2, (heads, -1)).requires_grad_() for x in (q, k, p))
    return *parts, e


def padding(batch: int, frames: int, device: torch.device | str) -> torch.Tensor:
    """Padding of ever shorter sequences; the last of several is all padding."""
    lengths = torch.linspace(frames, 0 if batch > 1 else frames, batch, device=device).long()
    return torch.arange(frames, device=device) >= lengths.unsqueeze(1)


def dense(pairs: int, size: int) -> int:
    """Bytes of what the scores are made from, for an element size: products, those with positions (twice), the sum."""
    return 4 * pairs * size


def _case(
    name: str,
    targets: int,
    batch: int,
    heads: int,
    channels: int,
    *,
    sources: int | None = None,
    query: int = 32,
    position: int = 4,
    padded: bool = False,
    masked: bool = False,
    chunk: int = -1,
    left_chunks: int = -1,
    penalty: float = 0.0,
    large: bool = False,
) -> Case:
    sources = sources or targets

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        q, k, p, e = weights_inputs(targets, sources, batch, heads, query, position, dtype, device)
        v = leaf(sources, batch, heads, channels, dtype=dtype, device=device)
        masks = (
            padding(batch, sources, device) if padded else None,
            torch.rand(targets, sources, device=device) > 0.7 if masked else None,
            chunk,
            left_chunks,
        )
        detached = (x.detach() for x in (q, k, p, e))
        softmax = attention._softmax(*detached, *masks)
        return q, k, p, e, v, softmax, *masks, penalty, PENALTY_LIMIT

    pairs = targets * sources * batch * heads
    rows = (targets + sources) * batch * heads

    def moved(size: int) -> dict[str, int]:
        weights = rows * query * size + targets * batch * heads * (position * size + 4)
        values = rows * channels * size
        return {"forward": weights + values, "backward": 3 * weights + 2 * values}

    flops = 2 * pairs * (query + position + channels)
    backward = 2 * pairs * (3 * (query + position) + 2 * channels)
    return Case(name, inputs, moved, {"forward": flops, "backward": backward}, large, partial(dense, pairs))


CASES = [
    _case("odd, padded", 37, 3, 2, 12, padded=True),
    _case("one frame", 1, 1, 4, 12),
    _case("chunks", 70, 2, 2, 12, padded=True, chunk=16, left_chunks=2),
    _case("any mask, penalty", 35, 2, 2, 12, masked=True, penalty=0.01),
    _case("streaming", 16, 2, 2, 12, sources=80, padded=True),
    _case("wide values", 33, 2, 1, 144),
    _case("other head sizes", 40, 1, 3, 20, query=24, position=2),
    *(_case(stack.name, stack.frames, BATCH, stack.heads, 12, large=True) for stack in stacks("L")[:4]),
    _case("S stack 0, 14 min", 42000, 1, 4, 12, large=True),
]
