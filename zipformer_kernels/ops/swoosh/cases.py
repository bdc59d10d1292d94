"""Shapes that Swoosh is tested and measured on: hidden layers of the feed-forward modules at 30 s, and awkward ones."""

from __future__ import annotations

from math import prod

from zipformer_kernels.ops.cases import BATCH, Case, leaf, stacks

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
    _case("S stack 0, feed_forward2, 4 x 16 s", "l", 800, 4, 512, large=True),
    *(_case(stack.name, "l", stack.frames, BATCH, stack.hidden, large=True) for stack in stacks("L")[:4]),
    _case("conv embed, first layer, 30 x 30 s", "r", 30, 8, 2998, 80, large=True),
]
