"""Launchers of the Triton kernels of shared-weight attention; the kernels are in kernels.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zipformer_kernels.core.launch import GPU_DTYPES, cdiv, next_power_of_2, on_device, unsupported_dtype
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.attention import kernels
from zipformer_kernels.ops.attention.reference import empty_rows
from zipformer_kernels.ops.attention.scores import Masks, Scores, grouped
from zipformer_kernels.ops.attention.tiles import tile_of


@dataclass(frozen=True)
class Weights:
    """The weights' side of every kernel's arguments: tensors with unit last stride, masks as bytes, sizes."""

    q: Tensor
    k: Tensor
    p: Tensor | None
    e: Tensor | None  # (H, P, T + S - 1), contiguous
    softmax: Tensor
    masks: Masks

    @property
    def targets(self) -> int:
        return self.q.shape[0]

    @property
    def sources(self) -> int:
        return self.k.shape[0]

    @property
    def sequences(self) -> int:
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    def arguments(self) -> tuple:
        """The positional arguments that every kernel begins with."""
        q, k, (padding, mask, chunk, left_chunks) = self.q, self.k, self.masks
        p = q if self.p is None else self.p
        mask_strides = (0, 0) if mask is None else (mask.stride(0) if mask.ndim == 3 else 0, mask.stride(-2))
        return (
            *(q, *q.stride()[:3], k, *k.stride()[:3], p, *p.stride()[:3]),
            *(q if self.e is None else self.e, self.softmax),
            *(q if padding is None else padding, q if mask is None else mask),
            *(*mask_strides, self.targets, self.sources, self.sequences, self.heads),
            *(chunk, left_chunks if left_chunks >= 0 else 2**30),
        )

    def constants(self) -> dict[str, int | bool]:
        """The constants that every kernel takes."""
        return {
            "D": self.q.shape[3],
            "D_TILE": max(16, next_power_of_2(self.q.shape[3])),
            "P": 0 if self.p is None else self.p.shape[3],
            "PADDING": self.masks.key_padding_mask is not None,
            "MASK": self.masks.attn_mask is not None,
            "CHUNKS": self.masks.chunk > 0,
        }


def unit_stride(x: Tensor) -> Tensor:
    """x if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def weights_of(scores: Scores, softmax: Tensor, masks: Masks) -> Weights:
    """Brings an op's arguments into the layouts that the kernels take."""
    q, k, p, e = scores
    padding, mask, *rule = masks
    as_bytes = (
        None if padding is None else padding.contiguous().view(torch.uint8),
        None if mask is None else unit_stride(mask).view(torch.uint8),
    )
    return Weights(
        unit_stride(q),
        unit_stride(k),
        None if p is None else unit_stride(p),
        None if e is None else e.permute(1, 2, 0).contiguous(),  # a handle's lies so already
        softmax.contiguous(),
        Masks(*as_bytes, *rule),
    )


def softmax_rows(*args: Tensor | int | None) -> tuple[Tensor]:
    """The rows that make weights of scores, (H, B, T, 2); see reference.py."""
    scores, _, masks, _ = grouped(0, args)
    softmax = empty_rows(scores.q)
    if softmax.numel() > 0:
        weights = weights_of(scores, softmax, masks)
        tile = tile_of("softmax" if masks.attn_mask is None else "masked_softmax", scores.q.dtype)
        grid = (cdiv(weights.targets, tile.targets) * weights.sequences * weights.heads,)
        with on_device(scores.q):
            kernels.softmax_kernel[grid](
                *weights.arguments(), **weights.constants(), BM=tile.targets, BN=tile.sources, **tile.options()
            )
    return (softmax,)


def aggregate(weights: Weights, v: Tensor, out: Tensor, gate: Tensor, y: Tensor, gated: Tensor, is_gated: bool) -> None:
    """Launches the forward kernel; without a gate the last three tensors are not read."""
    channels = v.shape[3]
    tile = tile_of("aggregate", v.dtype)
    wide = tile.block(channels)
    rows = cdiv(weights.targets, tile.targets) * weights.sequences * weights.heads
    with on_device(v):
        kernels.aggregate_kernel[(rows, cdiv(channels, wide))](
            *weights.arguments(),
            *(v, *v.stride()[:3], gate, out, y, gated, channels),
            **weights.constants(),
            BM=tile.targets,
            BN=tile.sources,
            BC=wide,
            GATED=is_gated,
            **tile.options(),
        )


def score_gradients(
    weights: Weights,
    needs: tuple[bool, bool, bool, bool, bool],
    v: Tensor,
    grad: Tensor,
    delta: Tensor,
    penalty: float,
    limit: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, p, e, and v from that of the result, `grad`. v's only where one block holds its channels."""
    need_q, need_k, need_p, need_e, need_v = needs
    q, k, p = weights.q, weights.k, weights.p
    targets, sources, sequences, heads = weights.targets, weights.sources, weights.sequences, weights.heads
    channels, dtype = v.shape[3], v.dtype
    position_tile = next_power_of_2(0 if p is None else p.shape[3])
    common = (
        *weights.arguments(),
        *(v, *v.stride()[:3], grad, *grad.stride()[:3], delta, penalty, limit),
    )
    constants = weights.constants()
    dq = dk = dp = de = dv = None
    with on_device(v):
        if need_q or need_p:
            dq = q.new_empty(q.shape)
            dp = None if p is None else p.new_empty(p.shape)
            tile = tile_of("query", dtype)
            grid = (cdiv(targets, tile.targets) * sequences * heads,)
            kernels.query_gradient_kernel[grid](
                *(*common, dq, dq if dp is None else dp, channels),
                **constants,
                **tile.blocks(channels),
                P_TILE=position_tile,
                BM=tile.targets,
                BN=tile.sources,
                **tile.options(),
            )
        tile = tile_of("key", dtype)
        one_block = channels <= tile.channels
        if need_k or (need_v and one_block):
            dk = k.new_empty(k.shape)
            dv = v.new_empty(v.shape) if one_block else None
            grid = (cdiv(sources, tile.sources) * sequences * heads,)
            kernels.key_gradient_kernel[grid](
                *(*common, dk, dk if dv is None else dv, channels),
                **constants,
                **tile.blocks(channels),
                BM=tile.targets,
                BN=tile.sources,
                **tile.options(),
            )
        if need_e:
            # One part per sequence, added in a fixed order; each is as long as two rows of scores.
            parts = torch.empty(sequences, *weights.e.shape, dtype=torch.float32, device=v.device)
            tile = tile_of("position", dtype)
            grid = (cdiv(targets + sources - 1, tile.targets) * sequences * heads,)
            kernels.position_gradient_kernel[grid](
                *(*common, parts, channels),
                **constants,
                **tile.blocks(channels),
                P_TILE=position_tile,
                BN=tile.targets,
                **tile.options(),
            )
            de = parts.sum(0).permute(2, 0, 1).to(weights.e.dtype)
    return dq, dk, dp, de, dv


def value_gradient(
    weights: Weights, x: Tensor, gate: Tensor, grad: Tensor, dv: Tensor, dgate: Tensor, is_gated: bool
) -> None:
    """Launches the kernel for the gradient of wide values; without a gate only `dv` is written."""
    channels = x.shape[3]
    tile = tile_of("value", x.dtype)
    wide = tile.block(channels)
    rows = cdiv(weights.sources, tile.sources) * weights.sequences * weights.heads
    with on_device(x):
        kernels.value_gradient_kernel[(rows, cdiv(channels, wide))](
            *weights.arguments(),
            *(x, gate, *x.stride()[:3], grad, *grad.stride()[:3], dv, dgate, channels),
            **weights.constants(),
            BM=tile.targets,
            BN=tile.sources,
            BC=wide,
            GATED=is_gated,
            **tile.options(),
        )


def compute_delta(grad: Tensor, out: Tensor, **gated: Tensor) -> Tensor:
    """delta[h, b, i] = sum_c grad out, (H, B, T). With x, gate, y: the gated form, which fills inner, dy, values."""
    targets, sequences, heads, channels = out.shape
    delta = torch.empty(heads, sequences, targets, dtype=torch.float32, device=out.device)
    tile = tile_of("delta", out.dtype)
    x = gated.get("x", out)
    others = [gated.get(name, out) for name in ("inner", "dy", "values")]
    with on_device(out):
        kernels.delta_kernel[(cdiv(targets, tile.targets) * sequences * heads,)](
            *(
                grad,
                *grad.stride()[:3],
                out,
                delta,
                x,
                gated.get("gate", out),
                gated.get("y", out),
                *x.stride()[:3],
            ),
            *(*others, targets, sequences, heads, channels),
            BM=tile.targets,
            BC=tile.block(channels),
            GATED=bool(gated),
            **tile.options(),
        )
    return delta


def _forward(*args):
    scores, (v, softmax), masks, _ = grouped(2, args)
    out = v.new_empty(scores.q.shape[0], *v.shape[1:])
    if out.numel() > 0:
        aggregate(weights_of(scores, softmax, masks), unit_stride(v), out, out, out, out, is_gated=False)
    return (out,)


def _backward(needs, grads, saved, *args):
    scores, (v, softmax), masks, penalty = grouped(2, args)
    (out,) = saved
    if out.numel() == 0 or v.numel() == 0:
        zeros = (torch.zeros_like(x) if need else None for x, need in zip((*scores, v), needs, strict=False))
        return *zeros, None, None, None
    grad, v = unit_stride(grads[0].to(v.dtype)), unit_stride(v)
    weights = weights_of(scores, softmax, masks)
    delta = compute_delta(grad, out)
    dq, dk, dp, de, dv = score_gradients(weights, needs[:5], v, grad, delta, *penalty)
    if needs[4] and dv is None:
        dv = v.new_empty(v.shape)
        value_gradient(weights, v, v, grad, dv, dv, is_gated=False)
    return dq, dk, dp, de, dv, None, None, None


def unsupported(q: Tensor, k: Tensor, p: Tensor | None, e: Tensor | None, *rest: object) -> str | None:
    """Why the kernels cannot take these queries and keys, or None if they can."""
    if e is not None and e.ndim == 4:
        return "it takes one set of position projections for all sequences, got one for each"
    if q.shape[3] > 128:
        return f"it takes up to 128 query channels per head, got {q.shape[3]}"
    return unsupported_dtype(q, GPU_DTYPES)


launchers = Launchers(
    unsupported, _forward, _backward, variants={"softmax": Launchers(unsupported, softmax_rows, None)}
)
