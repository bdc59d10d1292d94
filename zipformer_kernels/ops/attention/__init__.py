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

from zipformer_kernels.ops.attention.native import stores
from zipformer_kernels.ops.attention.op import _op as _op
from zipformer_kernels.ops.attention.weights import (
    AttentionWeights,
    ChunkMask,
    aggregate,
    constant_attention,
    downsample_mask,
)
from zipformer_kernels.ops.sizes import merge_heads, split_heads

__all__ = [
    "AttentionWeights",
    "ChunkMask",
    "aggregate",
    "constant_attention",
    "downsample_mask",
    "merge_heads",
    "split_heads",
    "stores",
]
