"""Shapes that conv_module is tested and measured on: every encoder layer's convolutions at 30 s, and awkward ones."""

from __future__ import annotations

import torch

from zipformer_kernels.ops.cases import BATCH, Case, Stack, linear, linear_elements, normal, stacks


def _parameters(
    channels: int, kernel: int, chunked: bool, bias: bool, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor | None, ...]:
    """Weight and bias of the convolution; where `chunked` also those of the causal one and the edges' scales."""

    def parameter(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return normal(*shape, dtype=dtype, device=device, scale=scale)

    weight, b = parameter(channels, 1, kernel, scale=kernel**-0.5), parameter(channels) if bias else None
    if not chunked:
        return weight, b, None, None, None
    causal_weight = parameter(channels, 1, kernel // 2 + 1, scale=(kernel // 2 + 1) ** -0.5)
    return weight, b, causal_weight, parameter(channels), parameter(2, channels, kernel, scale=0.5)


def _padding(frames: int, batch: int, device: torch.device | str) -> torch.Tensor:
    """Padding of ever longer sequences, of at least half the frames."""
    lengths = torch.linspace(frames / 2, frames, batch, device=device).ceil()
    return torch.arange(frames, device=device) >= lengths[:, None]


def _taps(kernel: int, chunked: bool) -> int:
    """Products for each element."""
    return kernel + kernel // 2 + 1 if chunked else kernel


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
    n, taps = frames * batch * channels, _taps(kernel, chunk is not None)

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        projected = normal(frames, batch, 2 * channels, dtype=dtype, device=device, scale=2.0)
        a, s = (half.detach().requires_grad_() for half in projected.chunk(2, dim=2))
        parameters = _parameters(channels, kernel, chunk is not None, bias, dtype, device)
        parameters = (p if p is None else p.requires_grad_() for p in parameters)
        return a, s, *parameters, _padding(frames, batch, device) if padded else None, chunk or -1, dtype

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


def _inference(
    name: str,
    frames: int,
    batch: int,
    channels: int,
    kernel: int,
    *,
    chunk: int | None = None,
    left: bool = False,
    bias: bool = True,
    padded: bool = False,
    large: bool = False,
) -> Case:
    """The variant ``infer``; chunk sizes as of `_case`, or with `left` all frames are one chunk of a stream."""
    n, chunked = frames * batch * channels, chunk is not None or left

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        on = {"dtype": dtype, "device": device}
        x, x_bias = normal(frames, batch, 2 * channels, scale=2.0, **on), normal(2 * channels, **on) if bias else None
        context = normal(batch, channels, kernel // 2, **on) if left else None
        parameters = _parameters(channels, kernel, chunked, bias, **on)
        return x, x_bias, context, *parameters, _padding(frames, batch, device) if padded else None, chunk or -1

    elements = 3 * n + channels * (_taps(kernel, chunked) + 4) + (2 * channels * kernel if chunked else 0)
    flops = 2 * n * _taps(kernel, chunked)
    return Case(name, inputs, lambda size: {"forward": size * elements}, {"forward": flops}, large)


def _stream(
    name: str,
    frames: int,
    batch: int,
    channels: int,
    kernel: int,
    *,
    bias: bool = True,
    padded: bool = False,
    large: bool = False,
) -> Case:
    """The variant ``stream``."""
    rows = frames * batch

    def inputs(dtype: torch.dtype, device: torch.device | str) -> tuple:
        on = {"dtype": dtype, "device": device}
        return (
            normal(frames, batch, channels, **on),
            *linear(2 * channels, channels, bias, **on),
            normal(batch, channels, kernel // 2, **on),
            *_parameters(channels, kernel, True, bias, **on),
            _padding(frames, batch, device) if padded else None,
            *linear(channels, channels, bias, **on),
        )

    products = linear_elements(2 * channels, channels) + linear_elements(channels, channels)
    context = 2 * batch * channels * (kernel // 2)
    elements = products + context + channels * (_taps(kernel, True) + 2 + 2 * kernel) + 2 * rows * channels
    flops = 2 * rows * channels * (3 * channels + _taps(kernel, True))
    return Case(name, inputs, lambda size: {"forward": size * elements}, {"forward": flops}, large)


def _chunk_of(stack: Stack) -> tuple[str, int]:
    """The name and the frames of a stream's chunk of 32 of the encoder's frames."""
    return f"{stack.name.split(',')[0]}, a chunk of 32", 32 // stack.downsampling


VARIANT_CASES = {
    "infer": [
        _inference("odd sizes, padded", 13, 3, 17, 5, padded=True),
        _inference("one element", 1, 1, 1, 1),
        _inference("no frames", 0, 2, 8, 3),
        _inference("shorter than the kernel, no bias", 3, 2, 24, 31, bias=False),
        _inference("longer than a tile", 140, 1, 40, 15),
        _inference("chunks that do not divide the frames", 70, 2, 24, 31, chunk=32, padded=True),
        _inference("a stream's chunk", 8, 2, 9, 15, left=True, padded=True),
        _inference("no frames of a stream", 0, 2, 8, 5, left=True),
        *(_inference(s.name, s.frames, BATCH, s.channels, s.kernel, large=True) for s in stacks("L")[:4]),
    ],
    "stream": [
        _stream("odd sizes, padded", 5, 3, 9, 5, padded=True),
        _stream("one element", 1, 1, 1, 1),
        _stream("no frames", 0, 2, 8, 5),
        _stream("shorter than the kernel", 7, 1, 70, 31),
        _stream("no bias", 4, 2, 9, 5, bias=False),
        _stream("more rows than auto takes", 23, 1, 48, 15, padded=True),
        *(
            _stream(*_chunk_of(stack), 1, stack.channels, stack.kernel, large=True)
            for stack in stacks("S")
            if stack.downsampling > 1
        ),
    ],
}
