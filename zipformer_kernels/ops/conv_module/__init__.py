"""The middle of the convolution module: gate, zeros on padding, depthwise convolution over time, on (T, batch, C).

Per sequence and channel, with x_t = a_t sigmoid(s_t), or zero on padding frames and beyond the ends, and K = 2 H + 1::

    y_t = b + sum_k w_k x_(t + k - H)

In chunks of S frames, with t at position p of its chunk and the second sum inside that chunk only::

    y_t = b' + sum_(k <= H) w'_k x_(t + k - H) + e_p (b + sum_k w_k x_(t + k - H))
    e_p = 1 + left_p + right_(p - S + K),   each where its index lies in 0 .. K - 1

Gradients, with d_t = dy_t, or e_p dy_t for what is inside chunks::

    dx_u = sum_k w_k d_(u + H - k),   da = dx sigmoid(s),   ds = dx a sigmoid(s) (1 - sigmoid(s)), zero on padding
    dw_k = sum d_t x_(t + k - H),   db = sum d_t,   de_p = sum dy_t (b + sum_k w_k x_(t + k - H))

Nothing but the arguments is stored for backward: the gate is computed again. Sums of gradients over frames are taken in
two stages of fixed order: the same inputs give the same bits.

Source: ``ConvolutionModule`` and ``ChunkCausalDepthwiseConv1d`` in upstream's ``zipformer.py`` and ``scaling.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.call import autocast_dtype
from zipformer_kernels.core.launch import GPU_DTYPES
from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.conv_module import cpu, cuda, eager, reference
from zipformer_kernels.ops.conv_module.launchers import ConvLaunchers
from zipformer_kernels.ops.shapes import as_mask, check_shapes

_op = Op(
    "conv_module",
    "Tensor a, Tensor s, Tensor weight, Tensor? bias, Tensor? causal_weight, Tensor? causal_bias, "
    "Tensor? edge_scale, Tensor? padding, int chunk_size, ScalarType dtype",
    reference=reference.conv_module,
    backends={
        "eager": eager.launchers,
        "cpu": cpu.launchers,
        "cuda": cuda.launchers,
        **triton_launchers(__name__),
    },
    saves=("a", "s", "weight", "bias", "causal_weight", "causal_bias", "edge_scale", "padding"),
    fake=lambda a, *rest: (a.new_empty(a.shape, dtype=rest[-1]),),
)

BY_TORCH = eager.launchers
"""The passes of a layer by torch's operations, on any device: `zipformer_kernels.ops.conv_module.launchers`."""

_op.variant(
    "infer",
    "Tensor x, Tensor? x_bias, Tensor? left, Tensor weight, Tensor? bias, Tensor? causal_weight, Tensor? causal_bias, "
    "Tensor? edge_scale, Tensor? padding, int chunk_size",
    when="the bias of the projection before, SwooshR, and a stream's left context, without gradients",
    reference=reference.infer,
    saves=(),
    outputs=2,
    fake=lambda x, x_bias, left, *_: (
        x.new_empty(*x.shape[:2], x.shape[2] // 2),
        x.new_empty(0) if left is None else left.new_empty(left.shape),
    ),
)

_op.variant(
    "stream",
    "Tensor src, Tensor in_weight, Tensor? in_bias, Tensor left, Tensor weight, Tensor? bias, Tensor causal_weight, "
    "Tensor? causal_bias, Tensor edge_scale, Tensor? padding, Tensor out_weight, Tensor? out_bias",
    when="the whole module and its residual sum, without gradients, on a stream's chunk of few rows",
    reference=reference.stream,
    saves=(),
    outputs=2,
    fake=lambda src, in_weight, in_bias, left, *_: (torch.empty_like(src), left.new_empty(left.shape)),
)


def in_layer(device: torch.device, dtype: torch.dtype) -> ConvLaunchers:
    """The launchers of a layer's passes, of the best backend that has them, or by torch's operations.

    Args:
        device, dtype: of the projection.
    """
    if dtype in GPU_DTYPES:
        for name in backends.candidates(device.type, _op.backends):
            own = _op.backends.get(name)
            if isinstance(own, ConvLaunchers) and backends.unserved_device(name, device.type) is None:
                return own
    return BY_TORCH


def conv_module(
    a: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The depthwise convolution over time of a * sigmoid(s), zero on padding.

    Args:
        a, s: (T, batch, channels), floating-point, on any device. Channels of stride 1 and equal strides, as the halves
            of a projection have, is the fast layout; others are copied.
        weight: (channels, 1, K), K odd; of the dtype of a, or any under autocast.
        bias: (channels,), or None.
        key_padding_mask: (batch, T), bools, or integers other than 0, for padding; or None.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
    Returns:
        (T, batch, channels), of the dtype of a, or of autocast's dtype under autocast (but float64 stays). The kernels
        take gate and sums in float32 or better and round once; Triton's round the gated input to the dtype of a.
    Raises:
        TypeError: an argument is not a tensor of a dtype that fits.
        ValueError: a shape or device does not fit.
        BackendError: `backend` cannot serve the call.
    """
    parameters = {"weight": weight, "bias": bias}
    key_padding_mask = as_mask("key_padding_mask", key_padding_mask)
    _check(a, s, parameters, {"weight": weight}, key_padding_mask)
    return _op(a, s, weight, bias, None, None, None, key_padding_mask, -1, _dtype(a, parameters), backend=backend)


def chunk_conv_module(
    a: Tensor,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor,
    causal_bias: Tensor | None,
    edge_scale: Tensor,
    chunk_size: int,
    key_padding_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The chunk-causal depthwise convolution of a * sigmoid(s), zero on padding.

    Args:
        a, s, key_padding_mask, backend: as of `conv_module`.
        weight: (channels, 1, K), K odd, of the convolution inside chunks.
        bias: (channels,), of the same; or None.
        causal_weight: (channels, 1, (K + 1) / 2), of the convolution that sees the past and the frame itself.
        causal_bias: (channels,), or None.
        edge_scale: (2, channels, K): the corrections `left` and `right` of the package's docstring.
        chunk_size: S; negative, or larger than T, for one chunk of all frames. Need not divide T.
    Returns:
        (T, batch, channels), of the dtype that edge_scale and the dtype of `conv_module`'s result promote to, as
        upstream's: float32 under autocast, where parameters are in float32.
    Raises:
        As `conv_module`; ValueError also for a `chunk_size` of 0.
    """
    parameters = {
        "weight": weight,
        "bias": bias,
        "causal_weight": causal_weight,
        "causal_bias": causal_bias,
        "edge_scale": edge_scale,
    }
    key_padding_mask = as_mask("key_padding_mask", key_padding_mask)
    _check(a, s, parameters, {"weight": weight, "causal_weight": causal_weight}, key_padding_mask)
    channels = a.shape[2]
    wanted = (2, channels, weight.shape[2])
    if edge_scale.shape != wanted:
        raise ValueError(f"edge_scale must have shape {wanted}, got {tuple(edge_scale.shape)}")
    if causal_weight.shape[2] != weight.shape[2] // 2 + 1:
        raise ValueError(
            f"causal_weight must have shape {(channels, 1, weight.shape[2] // 2 + 1)}, got {tuple(causal_weight.shape)}"
        )
    if chunk_size == 0:
        raise ValueError("chunk_size must not be 0")
    dtype = _dtype(a, {name: p for name, p in parameters.items() if name != "edge_scale"})
    dtype = torch.promote_types(dtype, edge_scale.dtype)
    return _op(
        a, s, weight, bias, causal_weight, causal_bias, edge_scale, key_padding_mask, chunk_size, dtype, backend=backend
    )


def infer_conv_module(
    x: Tensor,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    causal_weight: Tensor | None = None,
    causal_bias: Tensor | None = None,
    edge_scale: Tensor | None = None,
    *,
    chunk_size: int = -1,
    key_padding_mask: Tensor | None = None,
    left: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """SwooshR of `conv_module`, or of `chunk_conv_module`, of both halves of a projection; results carry no gradient.

    Args:
        x: (T, batch, 2 channels): a, then s, less their bias.
        x_bias: (2 channels,), or None.
        weight, bias, causal_weight, causal_bias, edge_scale, chunk_size, key_padding_mask: as of `chunk_conv_module`;
            without causal_weight as of `conv_module`. All of one dtype.
        left: (batch, channels, K // 2), the gated input of the frames before x, which then is one chunk; or None.
    Returns:
        (T, batch, channels) in the dtype of x; and, with `left`, that for the next chunk, otherwise None.
    Raises:
        ValueError: x or `left` does not fit the weights.
        BackendError: `backend` cannot serve the call.
    """
    frames, batch, channels = x.shape[0], x.shape[1], weight.shape[0]
    key_padding_mask = as_mask("key_padding_mask", key_padding_mask)
    if x.shape[2] != 2 * channels:
        raise ValueError(f"x must have {2 * channels} channels, twice those of weight, got {tuple(x.shape)}")
    taps = weight.shape[-1]
    if taps % 2 == 0:
        raise ValueError(f"weight must have an odd number of taps, got {taps}")
    check_shapes(
        x_bias=(x_bias, (2 * channels,)),
        weight=(weight, (channels, 1, taps)),
        bias=(bias, (channels,)),
        causal_weight=(causal_weight, (channels, 1, taps // 2 + 1)),
        causal_bias=(causal_bias, (channels,)),
        edge_scale=(edge_scale, (2, channels, taps)),
        key_padding_mask=(key_padding_mask, (batch, frames)),
        left=(left, (batch, channels, taps // 2)),
    )
    parameters = weight, bias, causal_weight, causal_bias, edge_scale
    chunk_size = -1 if left is not None else chunk_size
    infer = _op.variants["infer"]
    y, following = infer(x, x_bias, left, *parameters, key_padding_mask, chunk_size, backend=backend)
    return y, None if left is None else following


def _check(
    a: Tensor,
    s: Tensor,
    parameters: dict[str, Tensor | None],
    weights: dict[str, Tensor],
    padding: Tensor | None,
) -> None:
    for name, tensor in {"a": a, "s": s, **parameters, "key_padding_mask": padding}.items():
        if tensor is None and name in ("bias", "causal_bias", "key_padding_mask"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if name != "key_padding_mask" and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != a.device:
            raise ValueError(f"{name} must be on the device of a, {a.device}, got {tensor.device}")
    if a.ndim != 3:
        raise ValueError(f"a must have shape (T, batch, channels), got {tuple(a.shape)}")
    if s.shape != a.shape or s.dtype != a.dtype:
        raise ValueError(f"s must be as a, {tuple(a.shape)} in {a.dtype}, got {tuple(s.shape)} in {s.dtype}")
    frames, batch, channels = a.shape
    for name, weight in weights.items():
        if weight.ndim != 3 or weight.shape[:2] != (channels, 1):
            raise ValueError(f"{name} must have shape ({channels}, 1, taps), got {tuple(weight.shape)}")
    if weights["weight"].shape[2] % 2 == 0:
        raise ValueError(f"weight must have an odd number of taps, got {weights['weight'].shape[2]}")
    for name in ("bias", "causal_bias"):
        bias = parameters.get(name)
        if bias is not None and bias.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(bias.shape)}")
    if padding is not None and padding.shape != (batch, frames):
        raise ValueError(f"key_padding_mask must have shape {(batch, frames)}, got {tuple(padding.shape)}")


def _dtype(a: Tensor, parameters: dict[str, Tensor | None]) -> torch.dtype:
    """The dtype of a convolution of a, as torch has it."""
    cast = autocast_dtype(a)
    if cast is not None and a.dtype != torch.float64:  # float64 passes through autocast as it is
        return cast
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype != a.dtype:
            raise TypeError(f"{name} must be of the dtype of a, {a.dtype}, without autocast, got {tensor.dtype}")
    return a.dtype
