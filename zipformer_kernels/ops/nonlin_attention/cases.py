"""Shapes that the gated averaging is tested and measured on: NonlinAttention of presets at 30 s, and awkward ones."""

from __future__ import annotations

from functools import partial

import torch

from zipformer_kernels.ops.attention.cases import dense, padding, weights_inputs
from zipformer_kernels.ops.attention.op import _op as attention
from zipformer_kernels.ops.cases import BATCH, Case, leaf, normal, stacks


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
        softmax = attention.variants["softmax"](*(x.detach() for x in scores), *masks)
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


def _inference(
    name: str, frames: int, batch: int, channels: int, *, heads: int = 1, bias: bool = True, large: bool = False
) -> Case:
    """The variant ``infer``, with `channels` for each head."""
    width = heads * channels

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        on = {"dtype": dtype, "device": device}
        weights = normal(heads, batch, frames, frames, dtype=torch.float32, device=device).softmax(dim=-1).to(dtype)
        return normal(frames, batch, 3 * width, **on), normal(3 * width, **on) if bias else None, weights

    pairs, values = frames * frames * batch * heads, frames * batch * width
    moved = lambda size: {"forward": size * (pairs + 4 * values + 3 * width)}  # noqa: E731
    return Case(name, inputs, moved, {"forward": 2 * pairs * channels}, large)


VARIANT_CASES = {
    "infer": [
        _inference("odd sizes", 37, 3, 5),
        _inference("one element", 1, 1, 1),
        _inference("no frames", 0, 2, 3),
        _inference("wide, no bias", 40, 2, 144, bias=False),
        _inference("three heads", 33, 2, 7, heads=3),
        *(
            _inference(stack.name, stack.frames, BATCH, 3 * stack.channels // 4, large=True)
            for stack in stacks("L")[1:4]
        ),
    ],
}
