"""conv_module in Triton: ``kernels.py`` and ``sum_kernels.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import GPU_DTYPES, cdiv, multiprocessors, on_device
from zipformer_kernels.ops.conv_module.arguments import Arguments, unsupported
from zipformer_kernels.ops.conv_module.kernels import backward_kernel, forward_kernel
from zipformer_kernels.ops.conv_module.passes import Outputs, Passes
from zipformer_kernels.ops.conv_module.sum_kernels import add_parts_kernel, edges_kernel, taps_kernel
from zipformer_kernels.ops.conv_module.sums import Sums
from zipformer_kernels.ops.swoosh.reference import OFFSET, SHIFT

FRAMES = tuning.entry("conv_module.triton_frames")
CHANNELS = tuning.entry("conv_module.triton_channels")
FILL = tuning.entry("conv_module.triton_fill")
SUM_FRAMES = tuning.entry("conv_module.triton_sum_frames")
SUM_TAPS = tuning.entry("conv_module.triton_sum_taps")
SUM_CHANNELS = tuning.entry("conv_module.triton_sum_channels")
SUM_PARTS = tuning.entry("conv_module.triton_sum_parts")
PART_FRAMES = tuning.entry("conv_module.triton_part_frames")
PARTS_PER_MULTIPROCESSOR = tuning.entry("conv_module.triton_parts")
WARPS = tuning.entry("conv_module.triton_warps")
BACKWARD_WARPS = tuning.entry("conv_module.triton_backward_warps")


class _Tiles:
    """How a pass over frames and channels is cut up."""

    def __init__(self, arguments: Arguments, warps: int) -> None:
        frames, batch, channels = arguments.a.shape
        tall, wide = FRAMES.value, CHANNELS.value
        fill = min(FILL.value, tall)
        rows = cdiv(tall + arguments.kernel - 1, fill) * fill
        self.sizes = frames, batch, channels, arguments.chunk, *arguments.a.stride()[:2]
        self.across = cdiv(frames, tall)
        self.grid = batch * self.across, cdiv(channels, wide)
        self.constants = {"FRAMES": tall, "ROWS": rows, "FILL": fill, "CHANNELS": wide, "num_warps": warps}
        self.constants |= {"SHIFT": SHIFT["r"], "OFFSET": OFFSET["r"]}

    def own(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory of each program for the tile and the frames around it."""
        shape = *self.grid, self.constants["ROWS"], self.constants["CHANNELS"]
        return torch.empty(shape, dtype=dtype, device=like.device)


def _forward(arguments: Arguments, y: Tensor | None, activated: Tensor | None, x_bias: Tensor | None) -> None:
    warps = WARPS if x_bias is None else BACKWARD_WARPS  # with both the bias and chunks four warps would spill
    tiles = _Tiles(arguments, warps.value)
    a = arguments.a
    weight, bias, causal_weight, causal_bias, edge_scale = arguments.parameters
    with on_device(a):
        forward_kernel[tiles.grid](
            a,
            arguments.s,
            arguments.padding,
            x_bias,
            weight,
            bias,
            causal_weight,
            causal_bias,
            edge_scale,
            y,
            activated,
            tiles.own(a, a.dtype),
            *tiles.sizes,
            tiles.across,
            K=arguments.kernel,
            CHUNKED=arguments.chunked,
            HAS_BIAS=bias is not None,
            HAS_CAUSAL_BIAS=causal_bias is not None,
            PADDED=arguments.padding is not None,
            BIASED=x_bias is not None,
            STORES=y is not None,
            ACTIVATES=activated is not None,
            **tiles.constants,
        )


def _backward(arguments: Arguments, dy: Tensor, y: Tensor | None, outputs: Outputs, found: Sums) -> Tensor:
    tiles, a = _Tiles(arguments, BACKWARD_WARPS.value), arguments.a
    channels = a.shape[2]
    most = PARTS_PER_MULTIPROCESSOR.value * multiprocessors(dy)
    parts = arguments.parts(PART_FRAMES.value, most) if found.parameters else 0
    columns = 2 * channels if found.inputs else 0
    total = found.rows * channels - columns
    partials = torch.empty(parts * total + tiles.grid[0] * columns, dtype=torch.float32, device=a.device)
    of_parts, of_tiles = partials[: parts * total], partials[parts * total :]
    sums = found.empty()
    with on_device(dy):
        x, d, scaled = _launch_inputs(arguments, tiles, dy, y, outputs, found, of_tiles)
        if found.parameters:
            _launch_parameters(arguments, x, d, scaled, found, of_parts, parts, total)
        if found.rows > 0:
            wide, at_once = SUM_CHANNELS.value, SUM_PARTS.value
            blocks = cdiv(total, wide)
            sizes = parts, total, tiles.grid[0], columns, parts * total, blocks
            add_parts_kernel[(blocks + cdiv(columns, wide),)](
                partials, sums, *sizes, PARTS=at_once, BLOCK=wide, num_warps=WARPS.value
            )
    return sums


def _launch_inputs(
    arguments: Arguments,
    tiles: _Tiles,
    dy: Tensor,
    y: Tensor | None,
    outputs: Outputs,
    found: Sums,
    of_tiles: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """da, ds and their partial sums; the gated input, the gradient of y, and e times it, for the parameters' sums."""
    a, chunked = arguments.a, arguments.chunked
    weight, _, causal_weight, _, edge_scale = arguments.parameters
    x = torch.empty(a.shape, dtype=a.dtype, device=a.device) if found.parameters else None
    d = torch.empty_like(dy) if found.parameters and y is not None else dy
    scaled = torch.empty_like(dy, dtype=torch.float32) if found.parameters and chunked else d
    own = tiles.own(a, dy.dtype)
    backward_kernel[tiles.grid](
        dy,
        y,
        a,
        arguments.s,
        arguments.padding,
        weight,
        causal_weight,
        edge_scale,
        outputs.da,
        outputs.ds,
        outputs.activated,
        x,
        d,
        scaled,
        of_tiles,
        own,
        tiles.own(a, torch.float32) if chunked else own,
        *tiles.sizes,
        outputs.step,
        tiles.across,
        K=arguments.kernel,
        CHUNKED=chunked,
        PADDED=arguments.padding is not None,
        ACTIVATED=y is not None,
        INPUTS=found.inputs,
        PARAMETERS=found.parameters,
        **tiles.constants,
    )
    return x, d, scaled


def _launch_parameters(
    arguments: Arguments,
    x: Tensor,
    d: Tensor,
    scaled: Tensor,
    found: Sums,
    partials: Tensor,
    parts: int,
    total: int,
) -> None:
    frames, batch, channels = sizes = arguments.a.shape
    kernel, chunk = arguments.kernel, arguments.chunk
    wide, tall, deep = SUM_CHANNELS.value, SUM_FRAMES.value, SUM_TAPS.value
    blocks = cdiv(channels, wide)
    offsets = [sum(found.lengths[:i]) for i in range(5)]
    across = cdiv(frames, tall)
    split = parts, blocks, total
    constants = {"FRAMES": tall, "CHANNELS": wide, "num_warps": WARPS.value}

    def add_taps(gradient: Tensor, taps: int, inside: bool, *places: int) -> None:
        grid = parts * blocks, cdiv(taps, deep)
        tiles: tuple[Any, ...] = across, batch * across, *split
        taps_kernel[grid](
            x, gradient, partials, *sizes, chunk, *tiles, *places, kernel, taps, inside, deep, **constants
        )

    add_taps(scaled, kernel, arguments.chunked, *offsets[:2])
    if arguments.chunked:
        add_taps(d, kernel // 2 + 1, False, *offsets[2:4])
        weight, bias = arguments.parameters[:2]
        edges_kernel[parts * blocks, cdiv(2 * kernel, tall)](
            x,
            d,
            weight,
            bias,
            partials,
            *sizes,
            chunk,
            cdiv(frames, chunk),
            *split,
            offsets[4],
            K=kernel,
            HAS_BIAS=bias is not None,
            **constants,
        )


launchers = Passes(_forward, _backward, partial(unsupported, GPU_DTYPES)).launchers()
