"""Shapes that shared-weight attention is tested and measured on: self-attention at 30 s, and awkward ones."""

from __future__ import annotations

from functools import partial

import torch

from zipformer_kernels.ops.attention.op import _op
from zipformer_kernels.ops.cases import BATCH, Case, leaf, linear, linear_elements, normal, stacks

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
) -> dict[str, Case]:
    """The cases of the op, under ``attention``, and of its variants ``softmax`` and ``weights``, by their names."""
    sources = sources or targets

    def scores(dtype: torch.dtype, device: torch.device | str) -> tuple[tuple, tuple]:
        """q, k, p, e, and the masks."""
        masks = (
            padding(batch, sources, device) if padded else None,
            torch.rand(targets, sources, device=device) > 0.7 if masked else None,
            chunk,
            left_chunks,
        )
        return weights_inputs(targets, sources, batch, heads, query, position, dtype, device), masks

    def softmax_inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        tensors, masks = scores(dtype, device)
        return *(x.detach() for x in tensors), *masks

    def dense_inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        tensors, masks = scores(dtype, device)
        return *tensors, *masks, penalty, PENALTY_LIMIT

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        tensors, masks = scores(dtype, device)
        v = leaf(sources, batch, heads, channels, dtype=dtype, device=device)
        softmax = _op.variants["softmax"](*(x.detach() for x in tensors), *masks)
        return *tensors, v, softmax, *masks, penalty, PENALTY_LIMIT

    pairs = targets * sources * batch * heads
    rows = (targets + sources) * batch * heads

    def score_bytes(size: int) -> int:
        return rows * query * size + targets * batch * heads * (position * size + 4)

    def moved(size: int) -> dict[str, int]:
        values = rows * channels * size
        return {"forward": score_bytes(size) + values, "backward": 3 * score_bytes(size) + 2 * values}

    def dense_moved(size: int) -> dict[str, int]:
        written = pairs * size
        return {"forward": score_bytes(size) + written, "backward": 3 * score_bytes(size) + 2 * written}

    of_scores = 2 * pairs * (query + position)
    of_values = 2 * pairs * channels
    held = partial(dense, pairs)
    flops = {"forward": of_scores + of_values, "backward": 3 * of_scores + 2 * of_values}
    dense_flops = {"forward": of_scores, "backward": 3 * of_scores}
    softmax_moved = lambda size: {"forward": score_bytes(size)}  # noqa: E731
    return {
        "attention": Case(name, inputs, moved, flops, large, held),
        "softmax": Case(name, softmax_inputs, softmax_moved, {"forward": of_scores}, large, held),
        "weights": Case(name, dense_inputs, dense_moved, dense_flops, large, held),
    }


_ALL = [
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

CASES = [case["attention"] for case in _ALL]


def _stream(
    name: str,
    frames: int,
    context: int,
    batch: int,
    channels: int,
    heads: int,
    values: int,
    *,
    gated: bool = False,
    bias: bool = True,
    large: bool = False,
) -> Case:
    """The variant ``stream``, with `values` channels for each head."""
    width, sources = heads * values, context + frames
    thirds = 3 if gated else 1

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        on = {"dtype": dtype, "device": device}
        weights = normal(heads, batch, frames, sources, dtype=torch.float32, device=device).softmax(dim=-1).to(dtype)
        return (
            normal(frames, batch, channels, **on),
            *linear(thirds * width, channels, bias, **on),
            normal(context, batch, width, **on),
            weights,
            *linear(channels, width, bias, **on),
            gated,
        )

    products = linear_elements(thirds * width, channels) + linear_elements(channels, width)
    elements = products + batch * (2 * frames * channels + (context + sources) * width + heads * frames * sources)
    flops = 2 * frames * batch * width * ((thirds + 1) * channels + sources)
    return Case(name, inputs, lambda size: {"forward": size * elements}, {"forward": flops}, large)


def _streams_of(preset: str) -> list[Case]:
    """Self-attention and NonlinAttention on a chunk of 32 of the encoder's frames, with a left context of 128."""
    found = []
    for stack in (stack for stack in stacks(preset) if stack.downsampling > 1):
        frames, context, name = 32 // stack.downsampling, 128 // stack.downsampling, stack.name.split(",")[0]
        sizes = frames, context, 1, stack.channels
        found.append(_stream(f"{name}, a chunk of 32", *sizes, stack.heads, 12, large=True))
        found.append(
            _stream(f"{name}, a chunk of 32, gated", *sizes, 1, 3 * stack.channels // 4, gated=True, large=True)
        )
    return found


VARIANT_CASES = {
    "softmax": [case["softmax"] for case in _ALL],
    "weights": [case["weights"] for case in _ALL],
    "stream": [
        _stream("odd sizes", 5, 3, 3, 33, 2, 5),
        _stream("odd sizes, gated", 5, 17, 3, 33, 1, 14, gated=True),
        _stream("one element, no context", 1, 0, 1, 1, 1, 1),
        _stream("no frames", 0, 5, 2, 8, 2, 3),
        _stream("no bias", 4, 5, 2, 9, 2, 3, bias=False, gated=True),
        _stream("more rows than auto takes", 23, 40, 1, 33, 4, 12),
        *_streams_of("S"),
    ],
}
