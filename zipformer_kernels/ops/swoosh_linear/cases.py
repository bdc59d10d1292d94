"""Shapes that swoosh_linear is tested and measured on: the feed-forward modules at 30 s, and awkward ones."""

from __future__ import annotations

from math import prod

import torch

from zipformer_kernels.ops.cases import BATCH, Case, leaf, linear, linear_elements, normal, stacks

FLOPS_PER_ELEMENT = {"forward": 29, "backward": 47}  # of the elementwise passes


def _case(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    out_channels: int,
    *,
    shared: tuple[int, ...] | None = (0,),
    bias: bool = True,
    large: bool = False,
) -> Case:
    """x of `shape`, its mask of size 1 in the dimensions `shared`; no mask if that is None."""
    n, in_channels = prod(shape), shape[-1]
    rows = n // in_channels
    mask_shape = () if shared is None else [1 if i in shared else size for i, size in enumerate(shape)]

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        x = leaf(*shape, dtype=dtype, device=device, scale=4.0)
        weight = leaf(out_channels, in_channels, dtype=dtype, device=device, scale=in_channels**-0.5)
        b = leaf(out_channels, dtype=dtype, device=device) if bias else None
        chosen = torch.rand(mask_shape, device=device) > 0.3
        mask = None if shared is None else chosen * (1 / 0.7)
        return x, weight, b, mask, kind, dtype

    def moved(size: int) -> dict[str, int]:
        weights, results = in_channels * out_channels, rows * out_channels
        mask = 0 if shared is None else 4 * prod(mask_shape)
        return {
            "forward": size * (n + weights + out_channels + results) + mask,
            "backward": size * (2 * n + 2 * weights + out_channels + results) + mask,
        }

    flops = {
        "forward": 2 * n * out_channels + FLOPS_PER_ELEMENT["forward"] * n,
        "backward": 4 * n * out_channels + FLOPS_PER_ELEMENT["backward"] * n,
    }
    return Case(name, inputs, moved, flops, large)


def _feed_forward(preset: str) -> list[Case]:
    """The second feed-forward module of each stack, at the stack's frame rate."""
    return [
        _case(stack.name, "l", (stack.frames, BATCH, stack.hidden), stack.channels, large=True)
        for stack in stacks(preset)
    ]


CASES = [
    _case("one element", "r", (1, 1, 1), 1),
    _case("odd sizes", "l", (13, 3, 17), 5),
    _case("no mask, no bias", "r", (21, 2, 48), 24, shared=None, bias=False),
    _case("mask shared over time", "l", (37, 3, 64), 16),
    _case("mask shared over time, batch first", "l", (3, 37, 64), 16, shared=(1,)),
    _case("mask of every element", "r", (9, 4, 40), 8, shared=()),
    _case("mask shared over channels", "l", (9, 4, 40), 8, shared=(2,)),
    _case("mask shared over the ends", "l", (5, 4, 3, 8), 8, shared=(0, 2)),
    _case("wide rows", "l", (3, 2, 2056), 24),
    *_feed_forward("S"),
    *_feed_forward("M"),
    *_feed_forward("L"),
]


def _chunk(
    name: str,
    rows: tuple[int, ...],
    channels: int,
    hidden: int,
    *,
    kind: str = "l",
    bias: bool = True,
    large: bool = False,
) -> Case:
    """A feed-forward module on a chunk, whose rows are given by all dimensions but the last."""
    count = prod(rows)

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        on = {"dtype": dtype, "device": device}
        src = normal(*rows, channels, **on)
        return src, *linear(hidden, channels, bias, **on), *linear(channels, hidden, bias, **on), kind

    elements = linear_elements(hidden, channels) + linear_elements(channels, hidden) + 2 * count * channels
    flops = count * hidden * (4 * channels + FLOPS_PER_ELEMENT["forward"])
    return Case(name, inputs, lambda size: {"forward": size * elements}, {"forward": flops}, large)


VARIANT_CASES = {
    "feed_forward": [
        _chunk("one element", (1, 1), 1, 1),
        _chunk("odd sizes", (5, 3), 33, 50),
        _chunk("no bias", (3,), 20, 40, bias=False, kind="r"),
        _chunk("no frames", (0, 2), 8, 12),
        _chunk("more rows than auto takes", (23, 1), 48, 17),
        *(
            _chunk(
                f"{stack.name.split(',')[0]}, a chunk of 32",
                (32 // stack.downsampling, 1),
                stack.channels,
                stack.hidden,
                large=True,
            )
            for stack in stacks("S")
            if stack.downsampling > 1
        ),
    ],
}
