"""Shapes that conv_module is tested and measured on: every encoder layer's convolutions at 30 s, and awkward ones."""

from __future__ import annotations

import torch

from zipformer_kernels.ops.cases import BATCH, Case, leaf, stacks


def _case(
    name: str,
    frames: int,
    batch: int,
    channels: int,
    kernel: int,
    *,
    chunk: int | None = None,
    bias: bool = True,
    padded: bool = False,
    large: bool = False,
) -> Case:
    """a and s are the halves of one tensor, as in the module. With a chunk size, the chunk-causal form."""
    n, taps = frames * batch * channels, kernel if chunk is None else kernel + kernel // 2 + 1

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        projected = (torch.randn(frames, batch, 2 * channels, device=device) * 2).to(dtype)
        a, s = (half.detach().requires_grad_() for half in projected.chunk(2, dim=2))

        def parameter(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return leaf(*shape, dtype=dtype, device=device, scale=scale)

        weight, b = parameter(channels, 1, kernel, scale=kernel**-0.5), parameter(channels) if bias else None
        causal: tuple = (None, None, None)
        if chunk is not None:
            width = kernel // 2 + 1
            causal = (
                parameter(channels, 1, width, scale=width**-0.5),
                parameter(channels),
                parameter(2, channels, kernel, scale=0.5),
            )
        lengths = torch.linspace(frames / 2, frames, batch, device=device).ceil()
        padding = torch.arange(frames, device=device) >= lengths[:, None] if padded else None
        return a, s, weight, b, *causal, padding, -1 if chunk is None else chunk, dtype

    def moved(size: int) -> dict[str, int]:
        parameters = channels * size * (taps + 2 + (0 if chunk is None else 2 * kernel))
        return {"forward": 3 * n * size + parameters, "backward": 5 * n * size + 2 * parameters}

    return Case(name, inputs, moved, {"forward": 2 * n * taps, "backward": 4 * n * taps}, large)


def _layers(preset: str, chunk: int | None = None) -> list[Case]:
    """The convolution of each stack, at the stack's frame rate; `chunk` in frames of the encoder."""
    return [
        _case(
            stack.name if chunk is None else f"causal {stack.name}",
            *(stack.frames, BATCH, stack.channels, stack.kernel),
            chunk=None if chunk is None else chunk // stack.downsampling,
            large=True,
        )
        for stack in stacks(preset)
    ]


CASES = [
    _case("one element", 1, 1, 1, 1),
    _case("no frames", 0, 2, 8, 3),
    _case("odd sizes, padded", 13, 3, 17, 5, padded=True),
    _case("shorter than the kernel", 3, 2, 24, 31, padded=True),
    _case("S stack 0, short", 140, 1, 192, 31, padded=True),
    _case("longer than a tile, no bias", 129, 2, 40, 15, bias=False),
    _case("two blocks of channels", 20, 1, 300, 7),
    _case("chunks of one frame", 5, 2, 9, 5, chunk=1, padded=True),
    _case("chunks shorter than the kernel", 23, 2, 33, 15, chunk=4, padded=True),
    _case("chunks as long as the kernel", 40, 1, 16, 7, chunk=7, bias=False),
    _case("chunks that do not divide the frames", 140, 2, 24, 31, chunk=32, padded=True),
    _case("one chunk", 37, 2, 24, 31, chunk=37),
    *_layers("S"),
    *_layers("M"),
    *_layers("L"),
    *_layers("S", chunk=32),
]
