"""Attention weights that are computed once and used by several modules, without a large tensor of T x S elements.

With T targets, S sources, and for each sequence b and head h::

    s[i, j] = q[i] . k[j] + p[i] . e[T - 1 - i + j],  -1000 where a mask forbids
    W = softmax(s) over j
    aggregate(v)[i] = sum_j W[i, j] v[j]

`AttentionWeights` (weights.py) holds q, k, p, e, the masks, and for each target the two numbers that make weights of
scores, exp(s - largest) scale; every use of it runs one fused kernel, and the gradients of its uses add. On backend
``eager`` it holds W itself; so it does on ``cpu`` as long as W is small, where uses leave what the gradients of q, k, p
and e need to one kernel (kept.py).

Source: section 3.2 of the Zipformer paper (arXiv:2310.11230); ``RelPositionMultiheadAttentionWeights`` and
``SelfAttention`` in upstream's ``zipformer.py``.
"""

from __future__ import annotations

from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.attention import native, reference
from zipformer_kernels.ops.attention.native import keeps_weights as stores

_softmax = Op(
    "attention_softmax",
    "Tensor q, Tensor k, Tensor? p, Tensor? e, Tensor? key_padding_mask, Tensor? attn_mask, int chunk, int left_chunks",
    reference=reference.softmax_rows,
    backends={
        "eager": reference.eager_softmax,
        "cpu": native.cpu_softmax,
        **triton_launchers(__name__, "softmax_launchers"),
    },
    saves=(),
    fake=lambda q, *_: (reference.empty_rows(q),),
)

_weights = Op(
    "attention_weights",
    "Tensor q, Tensor k, Tensor? p, Tensor? e, Tensor? key_padding_mask, Tensor? attn_mask, int chunk, "
    "int left_chunks, float penalty, float limit",
    reference=reference.weights,
    backends={"eager": reference.eager_weights, "cpu": native.cpu_weights},
    saves=("q", "k", "p", "e", "key_padding_mask", "attn_mask"),
    saves_outputs=(0,),
    fake=lambda q, k, *_: (q.new_empty(q.shape[2], q.shape[1], q.shape[0], k.shape[0]),),
)

_op = Op(
    "attention",
    "Tensor q, Tensor k, Tensor? p, Tensor? e, Tensor v, Tensor softmax, Tensor? key_padding_mask, Tensor? attn_mask, "
    "int chunk, int left_chunks, float penalty, float limit",
    reference=reference.attention,
    backends={"eager": reference.eager, "cpu": native.cpu, **triton_launchers(__name__)},
    saves=("q", "k", "p", "e", "v", "softmax", "key_padding_mask", "attn_mask"),
    saves_outputs=(0,),
    fake=lambda q, k, p, e, v, *_: (v.new_empty(q.shape[0], *v.shape[1:]),),
)

from zipformer_kernels.ops.attention.weights import (  # noqa: E402  (the handle calls the ops above)
    AttentionWeights,
    ChunkMask,
    aggregate,
    attention_weights,
    constant_attention,
    downsample_mask,
    merge_heads,
    split_heads,
)

__all__ = [
    "AttentionWeights",
    "ChunkMask",
    "aggregate",
    "attention_weights",
    "constant_attention",
    "downsample_mask",
    "merge_heads",
    "split_heads",
    "stores",
]
