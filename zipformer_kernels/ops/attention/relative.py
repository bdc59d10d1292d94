"""Attention with relative positions as one function, in the layout of torch's `scaled_dot_product_attention`.

It is one use of `AttentionWeights`: a Conformer's or a Transformer-XL's layer makes weights for itself alone, so there
is nothing to share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zipformer_kernels.core.call import autocast_dtype
from zipformer_kernels.ops.attention.masks import ChunkMask
from zipformer_kernels.ops.attention.weights import AttentionWeights, Average
from zipformer_kernels.ops.shapes import check_shapes


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor | None = None,
    pos: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | ChunkMask | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Exact attention with a score for the relative position, forward and backward.

    For each sequence and head, with T targets i and S sources j::

        s[i, j] = (q[i] . k[j] + p[i] . pos[T - 1 - i + j]) scale
        out[i] = sum_j softmax(s[i])[j] v[j]

    Row T - 1 of `pos` is thus that of the same frame where T = S, and row 0 that of the source furthest to the left.
    With p = q + pos_bias_v, q + pos_bias_u in the place of q, and pos = linear_pos(pos_emb) this is the attention of
    Transformer-XL and of ESPnet's Conformer, ``softmax((matrix_ac + rel_shift(matrix_bd)) / sqrt(d))``. Without p and
    pos it is plain attention. There may be more sources than targets, as behind a left context, or fewer.

    A mask says where **not** to attend, as in `torch.nn.MultiheadAttention`; a mask of bools of
    `torch.nn.functional.scaled_dot_product_attention` says the reverse: give ``~mask``. Masked scores are -1000, not
    minus infinity, and other scores should lie well above that. A target all of whose sources are masked gets the mean
    of all values, not NaN.

    Memory beyond inputs and results is linear in T and S, but for attention weights that are small enough to be stored,
    which is faster: less than 32 MB on ``cpu``, a small share of the device's memory at most on a GPU. On ``eager``,
    the reference, which serves what kernels cannot, it is a few times the T x S scores of all sequences and heads. A
    tensor as `attn_mask` has T x S elements itself; a `ChunkMask` has none.

    Under autocast, tensors in float32 and half precision are taken in the autocast dtype, as
    `scaled_dot_product_attention` takes them.

    Args:
        q: queries (batch, heads, T, D), in float32, float16 or bfloat16, on the CPU also in float64. Of all tensors
            any strides are taken.
        k: keys (batch, heads, S, D).
        v: values (batch, heads, S, C).
        p: position queries (batch, heads, T, P), or None for no positions. P may be any; up to 64 is made for.
        pos: projected positions (heads, T + S - 1, P) or (1, heads, T + S - 1, P), or (batch, heads, T + S - 1, P) on
            ``eager`` and ``cpu``; None where p is.
        key_padding_mask: (batch, S), bools, or integers other than 0, for sources that no target may attend to.
        attn_mask: bool (T, S) or (batch, T, S), True where a target may not attend to a source; or a `ChunkMask`, where
            T = S: ``ChunkMask(1)`` is causal attention.
        scale: of the scores, 1 / sqrt(D) by default; it is multiplied into q and p.
        backend: which backend to use; see `use_backend`.
    Returns:
        (batch, heads, T, C).
    Raises:
        TypeError: an argument is no tensor, or of a wrong dtype.
        ValueError: a shape does not fit the others, tensors are on several devices, or p comes without pos.
        BackendError: `backend` cannot serve the call.

    Source: Dai et al., arXiv:1901.02860; Gulati et al., arXiv:2005.08100.
    """
    _check(q, k, v, p, pos, attn_mask)
    q, k, v, p, pos = (None if x is None else _in_autocast(x) for x in (q, k, v, p, pos))
    _check_alike(q, k=k, v=v, p=p, pos=pos)
    scale = 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    if scale != 1:
        q, p = q * scale, None if p is None else p * scale
    if pos is not None:
        pos = (pos.squeeze(0) if pos.ndim == 4 and pos.shape[0] == 1 else pos).transpose(-3, -2)
    q, k, v, p = (None if x is None else x.permute(2, 0, 1, 3) for x in (q, k, v, p))
    weights = AttentionWeights(q, k, p, pos, key_padding_mask, attn_mask, backend=backend)
    return weights.use(Average(v)).permute(1, 2, 0, 3)


def _check(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor | None, pos: Tensor | None, attn_mask: Tensor | ChunkMask | None
) -> None:
    """Raises TypeError or ValueError as `rel_pos_attention`, for all but dtypes, devices and the shapes of masks."""
    for name, x in (("q", q), ("k", k), ("v", v), ("p", p), ("pos", pos)):
        optional = name in ("p", "pos")
        if not isinstance(x, Tensor) and not (optional and x is None):
            raise TypeError(f"{name} must be a tensor{' or None' if optional else ''}, got {type(x).__name__}")
        if name != "pos" and x is not None and x.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, frames, channels), got {tuple(x.shape)}")
    if not isinstance(attn_mask, Tensor | ChunkMask | None):
        raise TypeError(f"attn_mask must be a tensor of bools, a ChunkMask or None, got {type(attn_mask).__name__}")
    batch, heads, targets, channels = q.shape
    sources = k.shape[2]
    check_shapes(k=(k, (batch, heads, sources, channels)), v=(v, (batch, heads, sources, v.shape[3])))
    if p is None or pos is None:
        if p is not pos:
            raise ValueError(f"p and pos must be given together, got only {'pos' if p is None else 'p'}")
        return
    check_shapes(p=(p, (batch, heads, targets, p.shape[3])))
    shared = heads, max(targets + sources - 1, 0), p.shape[3]
    if tuple(pos.shape) not in (shared, (1, *shared), (batch, *shared)):
        raise ValueError(
            f"pos must have shape (heads, targets + sources - 1, channels of p) = {shared}, or a batch of 1 or {batch} "
            f"of these, got {tuple(pos.shape)}"
        )


def _in_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast would compute products in; float64 stays, as with torch's functions."""
    dtype = autocast_dtype(x)
    return x if dtype is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)


def _check_alike(q: Tensor, **others: Tensor | None) -> None:
    """Raises TypeError unless q is of a floating-point dtype and the others of its, ValueError for another device."""
    if not q.is_floating_point():
        raise TypeError(f"q must be of a floating-point dtype, got {q.dtype}")
    for name, x in others.items():
        if x is not None and x.dtype != q.dtype:
            raise TypeError(f"{name} must be of dtype {q.dtype} as q is, got {x.dtype}")
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {x.device}")
