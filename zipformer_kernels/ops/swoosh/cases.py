"""Shapes that Swoosh is tested and measured on: hidden layers of the feed-forward modules at 30 s, and awkward ones."""

from __future__ import annotations

from math import prod

from zipformer_kernels.ops.cases import Case, leaf

FLOPS_PER_ELEMENT = {"forward": 28, "backward": 16}


def _case(name: str, kind: str, *shape: int, large: bool = False) -> Case:
    n = prod(shape)
    return Case(
        name,
        lambda dtype, device: (leaf(*shape, dtype=dtype, device=device, scale=4.0), kind),
        lambda size: {"forward": 2 * n * size, "backward": 3 * n * size},
        {direction: n * count for direction, count in FLOPS_PER_ELEMENT.items()},
        large,
    )


CASES = [
    _case("one element", "r", 1),
    _case("odd rows", "l", 127, 3, 17),
    _case("S stack 1, feed_forward2, 4 x 16 s", "l", 800, 4, 512, large=True),
    _case("L stack 1, feed_forward2, 30 x 30 s", "l", 1500, 30, 512, large=True),
    _case("L stack 4, feed_forward2, 30 x 30 s", "l", 188, 30, 2048, large=True),
    _case("conv embed, first layer, 30 x 30 s", "r", 30, 8, 2998, 80, large=True),
]
