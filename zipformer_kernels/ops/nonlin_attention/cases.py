"""Shapes that the gated averaging is tested and measured on: NonlinAttention of presets at 30 s, and awkward ones."""

from __future__ import annotations

from functools import partial

import torch

from zipformer_kernels.ops import attention
from zipformer_kernels.ops.attention.cases import dense, padding, weights_inputs
from zipformer_kernels.ops.cases import BATCH, Case, leaf, stacks


def _case(
    name: str,
    frames: int,
    batch: int,
    channels: int,
    *,
    heads: int = 1,
    padded: bool = False,
    chunk: int = -1,
    left_chunks: int = -1,
    large: bool = False,
) -> Case:
    query, position = 32, 4

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        scores = weights_inputs(frames, frames, batch, heads, query, position, dtype, device)
        projected = leaf(frames, batch, 3 * heads * channels, dtype=dtype, device=device).detach()
        split = (x.unflatten(2, (heads, channels)).requires_grad_() for x in projected.chunk(3, dim=2))
        masks = padding(batch, frames, device) if padded else None, None, chunk, left_chunks
        softmax = attention._softmax(*(x.detach() for x in scores), *masks)
        return *scores, *split, softmax, *masks

    pairs = frames * frames * batch * heads
    rows = frames * batch * heads

    def moved(size: int) -> dict[str, int]:
        weights = 2 * rows * query * size + rows * (position * size + 4)
        values = rows * channels * size
        # forward: gate, x, y in, inner, out out; backward: the same three and inner and dout in, their gradients out
        return {"forward": weights + 5 * values, "backward": 3 * weights + 8 * values}

    flops = 2 * pairs * (query + position + channels)
    backward = 2 * pairs * (3 * (query + position) + 2 * channels)
    return Case(name, inputs, moved, {"forward": flops, "backward": backward}, large, partial(dense, pairs))


CASES = [
    _case("odd, padded", 37, 3, 40, padded=True),
    _case("one frame", 1, 1, 12),
    _case("chunks", 50, 2, 24, chunk=16, left_chunks=2),
    _case("wide", 33, 2, 144),
    _case("two heads", 20, 2, 9, heads=2),
    *(_case(stack.name, stack.frames, BATCH, 3 * stack.channels // 4, large=True) for stack in stacks("L")[:4]),
]
