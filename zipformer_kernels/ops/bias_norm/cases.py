"""Shapes that BiasNorm is tested and measured on: every encoder layer's output at 30 s, and awkward ones."""

from __future__ import annotations

from math import prod

import torch

from zipformer_kernels.ops.cases import BATCH, Case, leaf, stacks

FLOPS_PER_ELEMENT = {"forward": 4, "backward": 9}


def _case(name: str, *shape: int, half_parameters: bool = False, large: bool = False) -> Case:
    """x of `shape`, with parameters in float32 or better, or in the dtype of x."""
    n, channels = prod(shape), shape[-1]

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[torch.Tensor, ...]:
        parameters = dtype if half_parameters else torch.promote_types(dtype, torch.float32)
        x = leaf(*shape, dtype=dtype, device=device, scale=4.0)
        bias = leaf(channels, dtype=parameters, device=device, scale=0.5)
        return x, bias, torch.full((), 0.7, dtype=parameters, device=device, requires_grad=True)

    def moved(size: int) -> dict[str, int]:
        result = size if half_parameters else max(size, 4)
        rows = n // channels
        return {
            "forward": n * (size + result) + 4 * rows + 4 * channels,
            "backward": n * (2 * size + result) + 4 * rows + 8 * channels,
        }

    flops = {direction: n * count for direction, count in FLOPS_PER_ELEMENT.items()}
    return Case(name, inputs, moved, flops, large)


def _bypass_case(
    name: str, *shape: int, by_sequence: bool = False, half_parameters: bool = False, large: bool = False
) -> Case:
    """x and src_orig of `shape`, with parameters and scales, of each sequence or of all."""
    norm = _case(name, *shape, half_parameters=half_parameters, large=large)
    n, scales = prod(shape), shape[-2:] if by_sequence else shape[-1:]

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple[torch.Tensor, ...]:
        x, bias, log_scale = norm.inputs(dtype, device)
        return (
            x,
            bias,
            log_scale,
            leaf(*shape, dtype=bias.dtype, device=device),
            leaf(*scales, dtype=bias.dtype, device=device),
        )

    def moved(size: int) -> dict[str, int]:
        result = size if half_parameters else max(size, 4)
        return {
            direction: count + (n * {"forward": 1, "backward": 2}[direction] + 2 * prod(scales)) * result
            for direction, count in norm.bytes(size).items()
        }

    flops = {"forward": n * 7, "backward": n * 14}
    return Case(name, inputs, moved, flops, large)


def _layers(preset: str) -> list[Case]:
    """The norm at the end of a layer of each stack, at the stack's frame rate."""
    return [_case(stack.name, stack.frames, BATCH, stack.channels, large=True) for stack in stacks(preset)]


CASES = [
    _case("one element", 1, 1),
    _case("one channel", 70, 1),
    _case("odd rows", 13, 3, 127),
    _case("S stack 0, short", 21, 3, 192),
    _case("half-precision parameters", 9, 2, 384, half_parameters=True),
    _case("all lanes hold two packs", 20, 512),
    _case("L stack 3, short", 10, 768),
    _case("longest in registers", 11, 1024),
    _case("long rows", 5, 4096),
    _case("long odd rows", 3, 2, 5003),
    *_layers("S"),
    *_layers("M"),
    *_layers("L"),
]

VARIANT_CASES = {
    "bypass": [
        _bypass_case("one channel pack", 2, 3, 8),
        _bypass_case("S stack 0, short", 21, 3, 192),
        _bypass_case("S stack 0, short, by sequence", 21, 3, 192, by_sequence=True),
        _bypass_case("half-precision parameters", 9, 2, 384, half_parameters=True),
        _bypass_case("L stack 3, short, by sequence", 130, 2, 768, by_sequence=True),
        _bypass_case("longest in registers", 11, 1, 1024),
        _bypass_case("no frames", 0, 3, 24, by_sequence=True),
        _bypass_case("no sequences", 3, 0, 24, by_sequence=True),
        *(
            _bypass_case(
                f"{stack.name}{', by sequence' if own else ''}",
                *(stack.frames, BATCH, stack.channels),
                by_sequence=own,
                large=True,
            )
            for stack in stacks("L")
            for own in (False, True)
        ),
    ]
}
