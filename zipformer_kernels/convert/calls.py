"""The calls by which a module of each row is tried: a method's name and its arguments, random but for their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FRAMES, BATCHES, CONTEXT = 13, 2, 8


def _x(*shape: int) -> Tensor:
    return torch.randn(shape)


def _along(channels: int, dim: int) -> Tensor:
    shape = [2, 3, 4, 5]
    shape[dim] = channels
    return torch.randn(shape)


def _weights(targets: int, sources: int) -> Tensor:
    return _x(1, BATCHES, targets, sources).softmax(dim=-1)


def _padding(frames: int) -> Tensor:
    return torch.arange(frames) >= torch.tensor([[frames], [frames - 3]])


def _positions(m: Any, context: int = 0) -> Tensor:
    return _x(1, context + 2 * FRAMES - 1, m.linear_pos.in_features)


def _sequence(channels: int) -> Tensor:
    return _x(FRAMES, BATCHES, channels)


def _of_weights(m: Any) -> list[tuple]:
    calls = [("forward", _sequence(m.embed_dim), _positions(m), _padding(FRAMES))]
    if hasattr(m, "streaming_forward"):
        cache = _x(CONTEXT, BATCHES, m.num_heads * m.query_head_dim)
        positions = _positions(m, CONTEXT)
        calls.append(
            ("streaming_forward", _sequence(m.embed_dim), positions, cache, CONTEXT, _padding(CONTEXT + FRAMES))
        )
    return calls


def _of_average(m: Any) -> list[tuple]:
    calls = [("forward", _sequence(m.in_proj.in_features), _weights(FRAMES, FRAMES))]
    if hasattr(m, "streaming_forward"):
        gated = hasattr(m, "hidden_channels")
        cache = _x(1, BATCHES, CONTEXT, m.hidden_channels) if gated else _x(CONTEXT, BATCHES, m.in_proj.out_features)
        weights = _weights(FRAMES, CONTEXT + FRAMES)
        calls.append(("streaming_forward", _sequence(m.in_proj.in_features), weights, cache, CONTEXT))
    return calls


def _of_convolution(m: Any) -> list[tuple]:
    x = _sequence(m.in_proj.in_features)
    if not getattr(m, "causal", False):
        return [("forward", x, _padding(FRAMES))]
    cache = _x(BATCHES, m.in_proj.in_features, m.depthwise_conv.kernel_size // 2)
    return [("forward", x, _padding(FRAMES), 4), ("streaming_forward", x, cache, _padding(FRAMES))]


def _of_depthwise(m: Any) -> list[tuple]:
    x = _x(BATCHES, len(m.causal_conv.weight), FRAMES)
    calls: list[tuple] = [("forward", x), ("forward", x, 4)]
    if hasattr(m, "streaming_forward"):
        calls.append(("streaming_forward", x, _x(*x.shape[:2], m.kernel_size // 2)))
    return calls


def _caches(m: Any) -> list[Tensor]:
    """Of one layer."""
    value = CONTEXT, BATCHES, m.self_attn1.in_proj.out_features
    conv = BATCHES, m.embed_dim, m.conv_module1.depthwise_conv.kernel_size // 2
    key = CONTEXT, BATCHES, m.self_attn_weights.num_heads * m.self_attn_weights.query_head_dim
    shapes = key, (1, BATCHES, CONTEXT, m.nonlin_attention.hidden_channels), value, value, conv, conv
    return [_x(*shape) for shape in shapes]


def _of_layer(m: Any) -> list[tuple]:
    src, weights = _sequence(m.embed_dim), m.self_attn_weights
    calls = [("forward", src, _positions(weights), -1, None, _padding(FRAMES))]
    if m.conv_module1.causal and hasattr(m, "streaming_forward"):
        padding = _padding(CONTEXT + FRAMES)
        calls.append(("streaming_forward", src, _positions(weights, CONTEXT), *_caches(m), CONTEXT, padding))
    return calls


def _of_timed_layer(m: Any) -> list[tuple]:
    return [
        ("forward", _sequence(m.embed_dim), _positions(m.self_attn_weights), time, None, _padding(FRAMES))
        for time in (None, _x(BATCHES, m.embed_dim))
    ]


def _of_stack(m: Any) -> list[tuple]:
    layers, ds = m.encoder.layers if hasattr(m, "encoder") else m.layers, getattr(m, "downsample_factor", 1)
    src = _sequence(layers[0].embed_dim)
    calls = [("forward", src, -1, 1.0, None, _padding(FRAMES)[:, ::ds])]
    if layers[0].conv_module1.causal and hasattr(m, "streaming_forward"):
        caches = [cache for layer in layers for cache in _caches(layer)]
        padding = torch.zeros(BATCHES, CONTEXT + (FRAMES + ds - 1) // ds, dtype=torch.bool)
        calls.append(("streaming_forward", src, caches, CONTEXT, padding))
    return calls


def _of_timed_stack(m: Any) -> list[tuple]:
    inner = getattr(m, "encoder", m)
    time = None if inner.time_emb is None else _x(BATCHES, inner.time_emb[1].in_features)
    return [("forward", _sequence(inner.layers[0].embed_dim), time, None, _padding(FRAMES))]


def _of_encoder(m: Any) -> list[tuple]:
    frames = max(24, max(m.chunk_size))
    lengths = torch.tensor([frames, frames - 3])
    calls = [("forward", _x(frames, BATCHES, m.encoder_dim[0]), lengths, _padding(frames))]
    chunk, context = m.chunk_size[0], m.left_context_frames[0]
    if m.causal and chunk > 0 and context > 0:
        padding = torch.zeros(BATCHES, context + chunk, dtype=torch.bool)
        args = _x(chunk, BATCHES, m.encoder_dim[0]), torch.full((BATCHES,), chunk), m.get_init_states(BATCHES), padding
        calls.append(("streaming_forward", *args))
    return calls


def _of_convnext(m: Any) -> list[tuple]:
    x = _x(BATCHES, m.depthwise_conv.in_channels, FRAMES, 9)
    calls: list[tuple] = [("forward", x)]
    if hasattr(m, "streaming_forward"):
        calls.append(("streaming_forward", x, _x(*x.shape[:2], m.depthwise_conv.padding[0], 9)))
    return calls


def _of_conv_embed(m: Any) -> list[tuple]:
    frames, bins = 31, 4 * (m.out.in_features // m.conv[7].out_channels) + 3
    x, lengths = _x(BATCHES, frames, bins), torch.tensor([frames, frames - 4])
    calls: list[tuple] = [("forward", x, lengths)]
    if hasattr(m, "streaming_forward"):
        calls.append(("streaming_forward", x, torch.tensor([frames, frames]), m.get_init_states(BATCHES)))
    return calls


CALLS: dict[str, Callable[[Any], list[tuple]]] = {
    "SwooshL": lambda m: [("forward", _x(4, 3, 7))],
    "SwooshR": lambda m: [("forward", _x(4, 3, 7))],
    "BiasNorm": lambda m: [("forward", _along(m.num_channels, m.channel_dim))],
    "ActivationDropoutAndLinear": lambda m: [("forward", _sequence(m.weight.shape[1]))],
    "RelPositionMultiheadAttentionWeights": _of_weights,
    "SelfAttention": _of_average,
    "NonlinAttention": _of_average,
    "ZipformerEncoderLayer": _of_layer,
    "ZipformerEncoder": _of_stack,
    "DownsampledZipformerEncoder": _of_stack,
    "Zipformer": _of_encoder,
    "TimedEncoderLayer": _of_timed_layer,
    "TimedEncoder": _of_timed_stack,
    "TimedDownsampledEncoder": _of_timed_stack,
    "BypassModule": lambda m: [("forward", _sequence(len(m.bypass_scale)), _sequence(len(m.bypass_scale)))],
    "SimpleDownsample": lambda m: [("forward", _sequence(4))],
    "SimpleUpsample": lambda m: [("forward", _sequence(4))],
    "CompactRelPositionalEncoding": lambda m: [("forward", _sequence(1)), ("forward", _sequence(1), 0)],
    "ConvolutionModule": _of_convolution,
    "ChunkCausalDepthwiseConv1d": _of_depthwise,
    "FeedforwardModule": lambda m: [("forward", _sequence(m.in_proj.in_features))],
    "ConvNeXt": _of_convnext,
    "Conv2dSubsampling": _of_conv_embed,
    "Balancer": lambda m: [("forward", _along(m.num_channels, m.channel_dim))],
    "Whiten": lambda m: [("forward", _sequence(3 * m.num_groups))],
    "Dropout2": lambda m: [("forward", _sequence(4))],
    "Dropout3": lambda m: [("forward", _sequence(4))],
    "ScaleGrad": lambda m: [("forward", _sequence(4))],
    "ScheduledFloat": lambda m: [("__float__",)],
    "Identity": lambda m: [("forward", _sequence(4))],
}
