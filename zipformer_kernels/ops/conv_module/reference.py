"""conv_module in plain PyTorch: what every backend is tested against, and what exporters trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.ops.sizes import being_traced, compact, fill, first
from zipformer_kernels.ops.swoosh.reference import swoosh


def conv_module(
    a: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor | None,
    causal_bias: Tensor | None,
    edge_scale: Tensor | None,
    padding: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The convolution of a * sigmoid(s), zero on padding: (T, batch, channels) in `dtype`."""
    if a.numel() == 0:  # convolutions of no frames are errors
        return (a * torch.sigmoid(s)).to(dtype)
    x = (a * torch.sigmoid(s)).permute(1, 2, 0).to(dtype)
    if padding is not None:
        x = fill(x, padding.unsqueeze(1), 0.0)
    weight, bias, causal_weight, causal_bias, edge_scale = (
        None if p is None else p.to(dtype) for p in (weight, bias, causal_weight, causal_bias, edge_scale)
    )
    if causal_weight is None:
        y = depthwise(x, weight, bias, padding="same")
    else:
        past = partial(depthwise, weight=causal_weight, bias=causal_bias)
        within = partial(depthwise, weight=weight, bias=bias, padding="same")
        y = chunk_convolution(x, past, within, edge_scale, chunk_size)
    return compact(y.permute(2, 0, 1))


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str = "valid") -> Tensor:
    """The convolution of every channel of x, (batch, channels, T), with its own taps.

    On the CPU float16 is computed in float32 and rounded: there oneDNN (3.12, in torch 2.13) never returns from a
    convolution of 2 to 16 channels, if the processor has AVX-512 FP16.
    """
    convolve = partial(F.conv1d, padding=padding, groups=weight.shape[0])
    if x.dtype != torch.float16 or x.device.type != "cpu":
        return convolve(x, weight, bias)
    return convolve(*(None if t is None else t.float() for t in (x, weight, bias))).to(x.dtype)


def chunk_convolution(
    x: Tensor,
    past: Callable[[Tensor], Tensor],
    within: Callable[[Tensor], Tensor],
    edge_scale: Tensor,
    chunk_size: int,
) -> Tensor:
    """The causal convolution, plus the one inside chunks of `chunk_size` frames times its scale.

    Args:
        x: (batch, channels, T).
        past: the causal convolution, which takes K // 2 more frames than it returns.
        within: the one inside chunks, which keeps the number of frames.
        edge_scale: (2, channels, K).
        chunk_size: need not divide T; negative, or larger than T, for one chunk of all frames.
    """
    batch, channels, frames = x.shape
    causal = past(F.pad(x, (edge_scale.shape[2] // 2, 0)))
    if chunk_size < 0 or (not being_traced() and chunk_size > frames):
        return within(x) * chunk_factors(edge_scale, frames, frames) + causal
    chunks = (frames + chunk_size - 1) // chunk_size
    filled = first(F.pad(x, (0, chunk_size - 1)), chunks * chunk_size, dim=2)
    apart = compact(filled.reshape(batch, channels, chunks, chunk_size).transpose(1, 2))
    scaled = within(apart.reshape(batch * chunks, channels, chunk_size))
    scaled = scaled * chunk_factors(edge_scale, chunk_size, frames)
    joined = compact(scaled.reshape(batch, chunks, channels, chunk_size).transpose(1, 2))
    return first(joined.reshape(batch, channels, chunks * chunk_size), frames, dim=2) + causal


def chunk_factors(edge_scale: Tensor, places: int, frames: int) -> Tensor:
    """The factor on the convolution inside a chunk at each of its places: (channels, places).

    Args:
        edge_scale: (2, channels, K), corrections to 1 from the left edge on, and up to the right edge.
        places: how many to give: as many as a chunk has frames.
        frames: of the sequence. A chunk that it does not fill ends where it ends; what comes after means nothing.
    """
    beyond = edge_scale.shape[2] + 1
    left, right = F.pad(edge_scale, (1, 1)).unbind()  # no correction further away than K frames
    place = torch.arange(places, device=edge_scale.device)
    from_left = left.index_select(1, (place + 1).clamp(max=beyond))
    # The smaller of two sizes is taken of tensors: recorded as a size it may be settled by the example.
    from_end = torch.maximum(place - places, place - frames)
    return 1.0 + (from_left + right.index_select(1, (from_end + beyond).clamp(0, beyond)))


def infer(
    x: Tensor,
    x_bias: Tensor | None,
    left: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor | None,
    causal_bias: Tensor | None,
    edge_scale: Tensor | None,
    padding: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """SwooshR of `conv_module` of the halves of x + x_bias; with `left` one chunk, and `left` for the next."""
    a, s = (x if x_bias is None else x + x_bias).chunk(2, dim=2)
    parameters = weight, bias, causal_weight, causal_bias, edge_scale
    if left is None:
        return swoosh(conv_module(a, s, *parameters, padding, chunk_size, x.dtype), "r"), x.new_empty(0)
    gated = (a * torch.sigmoid(s)).permute(1, 2, 0)
    if padding is not None:
        gated = fill(gated, padding.unsqueeze(1), 0.0)
    joined = torch.cat([left, gated], dim=2)
    y = chunk_with_context(gated, joined, *parameters) if gated.numel() > 0 else gated
    return swoosh(y.permute(2, 0, 1), "r"), joined.narrow(2, gated.shape[2], left.shape[2])


def stream(
    src: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    left: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor,
    causal_bias: Tensor | None,
    edge_scale: Tensor,
    padding: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`infer` between the projections, added to src; and the next `left`."""
    parameters = weight, bias, causal_weight, causal_bias, edge_scale
    x = F.linear(src, in_weight)
    x, following = infer(x, in_bias, left, *parameters, padding, max(src.shape[0], 1))
    return src + F.linear(x, out_weight, out_bias), following


def chunk_with_context(
    x: Tensor,
    joined: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor,
    causal_bias: Tensor | None,
    edge_scale: Tensor,
) -> Tensor:
    """The two convolutions of one chunk x, (batch, channels, T), the causal one over `joined`: left context and x."""
    within = depthwise(x, weight, bias, padding="same") * chunk_factors(edge_scale, x.shape[2], x.shape[2])
    return within + depthwise(joined, causal_weight, causal_bias)
