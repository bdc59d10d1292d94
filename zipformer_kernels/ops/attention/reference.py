"""Shared-weight attention in plain PyTorch: the specification that every backend is tested against.

All shapes are time-major: T target frames, S source frames, B sequences, H heads, and D, P, C channels per head of
queries and keys, of position queries, and of values. The scores are

    s[h, b, i, j] = q[i, b, h] . k[j, b, h] + p[i, b, h] . e[T - 1 - i + j, h]

with those of masked pairs set to -1000, and the weights are their softmax over j.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, grouped
from zipformer_kernels.ops.sizes import being_traced, compact, fill

# exp(-1000) is zero in every dtype, and a row with every entry masked becomes uniform rather than NaN.
MASKED_SCORE = -1000.0


def scores(q: Tensor, k: Tensor, p: Tensor | None, e: Tensor | None) -> Tensor:
    """The scores before masking, (H, B, T, S)."""
    result = compact(q.permute(2, 1, 0, 3)) @ compact(k.permute(2, 1, 3, 0))
    if p is None:
        return result
    by_head = _by_head(e).transpose(2, 3).expand(-1, q.shape[1], -1, -1)
    by_offset = compact(p.permute(2, 1, 0, 3)) @ compact(by_head)
    return result + select_relative(by_offset)


def _by_head(e: Tensor) -> Tensor:
    """Position projections, one set for all sequences or one for each, as (H, 1 or B, T + S - 1, P)."""
    return e.permute(1, 0, 2).unsqueeze(1) if e.ndim == 3 else e.permute(2, 0, 1, 3)


def select_relative(by_offset: Tensor) -> Tensor:
    """From scores by offset to scores by source: ``out[..., i, j] = by_offset[..., i, T - 1 - i + j]``.

    With n offsets the wanted element lies at T - 1 + i (n - 1) + j of the flattened rows: rows of n - 1 elements, from
    the one at T - 1 on. So the result is a view. In a recorded program it is a gather, which holds for every length.

    Args:
        by_offset: (..., T, n), n = T + S - 1; column 0 is the source furthest to the left of the last target.

    Returns:
        (..., T, S).
    """
    *others, targets, offsets = by_offset.shape
    if being_traced():
        index = relative_index(targets, offsets - targets + 1, by_offset.device)
        return by_offset.gather(-1, index.expand(*others, -1, -1))
    if targets <= 1:
        return by_offset.reshape(*others, targets, offsets - targets + 1)
    rows = by_offset.flatten(-2).narrow(-1, targets - 1, targets * (offsets - 1))
    return rows.view(*others, targets, offsets - 1)[..., : offsets - targets + 1]


def relative_index(targets: int, sources: int, device: torch.device) -> Tensor:
    """The offset of source j from target i, T - 1 - i + j: (T, S)."""
    return torch.arange(targets - 1, -1, -1, device=device).unsqueeze(1) + torch.arange(sources, device=device)


def forbidden(shape: torch.Size, masks: Masks, device: torch.device) -> Tensor | None:
    """The union of all masks, bool and broadcastable to (B, T, S) = `shape`, or None if there is none."""
    key_padding_mask, attn_mask, chunk, left_chunks = masks
    found = []
    if key_padding_mask is not None:
        found.append(key_padding_mask.unsqueeze(1))
    if attn_mask is not None:
        found.append(attn_mask if attn_mask.ndim == 3 else attn_mask.unsqueeze(0))
    if chunk > 0:
        target = (torch.arange(shape[1], device=device) // chunk).unsqueeze(1)
        source = torch.arange(shape[2], device=device) // chunk
        rule = source > target
        if left_chunks >= 0:
            rule = rule | (source < target - left_chunks)
        found.append(rule.unsqueeze(0))
    if not found:
        return None
    union = found[0]
    for mask in found[1:]:
        union = union | mask
    return union


def masked_scores(given: Scores, masks: Masks) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scores, the scores with masked pairs at -1000, and the mask."""
    s = scores(*given)
    mask = forbidden(s.shape[1:], masks, given.q.device)
    return s, s if mask is None else masked(s, mask), mask


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores, -1000 where the mask, which broadcasts to them, is True."""
    return fill(scores, mask, MASKED_SCORE)


def softmax_rows(*args: Tensor | int | None) -> Tensor:
    """What makes weights of scores, (H, B, T, 2) in float32 or better: for each target the largest of its masked scores
    and the scale 1 / sum_j exp(s - largest). No gradient.

    In their place the log-sum-exp alone would do, but for its own rounding, which all weights of a target would share.
    """
    given, _, masks, _ = grouped(0, args)
    _, s, _ = masked_scores(given, masks)
    s = _wide(s)
    largest = s.amax(dim=-1) if s.shape[-1] > 0 else s.sum(dim=-1)
    scale = (s - largest.unsqueeze(-1)).exp().sum(dim=-1).reciprocal()
    return torch.stack([largest, scale], dim=-1)


def empty_rows(q: Tensor) -> Tensor:
    """Room for the result of `softmax_rows`."""
    return q.new_empty(q.shape[2], q.shape[1], q.shape[0], 2, dtype=wide_dtype(q.dtype))


def weights_from(masked: Tensor, rows: Tensor) -> Tensor:
    """exp(masked - largest) scale, in float32 or better; see `softmax_rows`."""
    largest, scale = rows.unsqueeze(-2).unbind(-1)
    return (_wide(masked) - largest).exp() * scale


def weights(*args: Tensor | int | float | None) -> Tensor:
    """W itself, (H, B, T, S), in the dtype of q. The penalty acts on gradients only.

    Args:
        args: q, k, p, e (`Scores`), the four of `Masks`, and the two of `Penalty`.
    """
    given, _, masks, _ = grouped(0, args)
    _, masked, _ = masked_scores(given, masks)
    return _wide(masked).softmax(dim=-1).to(given.q.dtype)


def attention(*args: Tensor | int | float | None) -> Tensor:
    """out[i, b, h] = sum_j W[h, b, i, j] v[j, b, h], (T, B, H, C). The penalty acts on gradients only.

    Args:
        args: q, k, p, e (`Scores`); v, (S, B, H, C); the result of `softmax_rows`, which is not read here; the four of
            `Masks`; and the two of `Penalty`.
    """
    given, (v, _), masks, penalty = grouped(2, args)
    w = weights(*given, *masks, *penalty)
    return (w.to(v.dtype) @ v.permute(2, 1, 0, 3)).permute(2, 1, 0, 3)


def forward(*args: Tensor | int | float | None) -> tuple[Tensor]:
    """The eager backend: the weights from the given softmax rows."""
    given, (v, softmax), masks, _ = grouped(2, args)
    _, masked, _ = masked_scores(given, masks)
    out = weights_from(masked, softmax).to(v.dtype) @ v.permute(2, 1, 0, 3)
    return (out.permute(2, 1, 0, 3).contiguous(),)


def backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | float | None
) -> tuple[Tensor | None, ...]:
    """With W the weights and D[i] = sum_c dout[i] out[i]::

    dv = W^T dout,  ds = W (dout v^T - D) where not masked,  plus penalty sign(s) where |s| > limit,
    dq[i] = sum_j ds[i, j] k[j],   dk[j] = sum_i ds[i, j] q[i],
    dp[i] = sum_j ds[i, j] e[T - 1 - i + j],   de[n] = sum over i, b of ds[i, n - (T - 1) + i] p[i].
    """
    given, (v, softmax), masks, penalty = grouped(2, args)
    _, masked, _ = masked_scores(given, masks)
    w = weights_from(masked, softmax)
    dout = _wide(grads[0]).permute(2, 1, 0, 3)
    out = _wide(saved[0]).permute(2, 1, 0, 3)
    dv = (w.transpose(2, 3) @ dout).permute(2, 1, 0, 3).to(v.dtype) if needs[4] else None
    ds = w * (dout @ _wide(v).permute(2, 1, 3, 0) - (dout * out).sum(-1, keepdim=True))
    return *_through_scores(needs, ds, given, masks, penalty), dv, None, None, None


def weights_backward(
    needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[Tensor], *args: Tensor | int | float | None
) -> tuple[Tensor | None, ...]:
    """From dW: ds = W (dW - sum_j W dW), and from there as in `backward`."""
    w, dw = _wide(saved[0]), _wide(grads[0])
    ds = w * (dw - (w * dw).sum(-1, keepdim=True))
    given, _, masks, penalty = grouped(0, args)
    return *_through_scores(needs, ds, given, masks, penalty), None, None


def _through_scores(
    needs: tuple[bool, ...], ds: Tensor, given: Scores, masks: Masks, penalty: Penalty
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, p and e from that of the scores before masks and penalty."""
    q, k, p, e = given
    s, _, mask = masked_scores(given, masks)
    if mask is not None:
        ds = ds.masked_fill(mask, 0.0)
    if penalty.weight != 0.0:
        ds = ds + penalty.weight * ((s > penalty.limit).to(ds.dtype) - (s < -penalty.limit).to(ds.dtype))
    dq = ds @ _wide(k).permute(2, 1, 0, 3)
    dk = ds.transpose(2, 3) @ _wide(q).permute(2, 1, 0, 3)
    dp = de = None
    if p is not None:
        by_offset = _spread_relative(ds)
        dp = (by_offset @ _by_head(_wide(e))).permute(2, 1, 0, 3)
        de = by_offset.transpose(2, 3) @ _wide(p).permute(2, 1, 0, 3)
        de = de.sum(1).permute(1, 0, 2) if e.ndim == 3 else de.permute(1, 2, 0, 3)
    time_major = (dq.permute(2, 1, 0, 3), dk.permute(2, 1, 0, 3), dp, de)
    return tuple(g.to(x.dtype) if need else None for g, x, need in zip(time_major, given, needs[:4], strict=True))


def _spread_relative(ds: Tensor) -> Tensor:
    """The adjoint of `select_relative`: (..., T, S) to (..., T, T + S - 1)."""
    targets, sources = ds.shape[-2:]
    spread = ds.new_zeros(*ds.shape[:-1], targets + sources - 1)
    return spread.scatter_(-1, relative_index(targets, sources, ds.device).expand(ds.shape), ds)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and its backward: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


def stream(
    src: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    context: Tensor,
    weights: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """src + linear(the average of linear(src), behind a context, with given weights), and the values averaged."""
    v, g = F.linear(src, in_weight, in_bias), None
    if gated:
        s, x, g = v.chunk(3, dim=2)
        v = x * s.tanh()
    joined = torch.cat([context, v])
    by_head = joined.unflatten(2, (weights.shape[0], -1)).permute(2, 1, 0, 3)
    average = (weights @ by_head).permute(2, 1, 0, 3).flatten(2)
    return src + F.linear(average if g is None else average * g, out_weight, out_bias), joined
