"""Attention weights that are computed once and used by several modules, without a large tensor of T x S elements.

With T targets, S sources, and for each sequence b and head h::

    s[i, j] = q[i] . k[j] + p[i] . e[T - 1 - i + j],  -1000 where a mask forbids
    W = softmax(s) over j
    aggregate(v)[i] = sum_j W[i, j] v[j]

An `AttentionWeights` (weights.py) is the handle of W. What it holds (held.py) is one of two:

- `StoredWeights`: W itself, on backend ``eager``, and on ``cpu`` and ``triton`` as long as W is small (budget.py).
- `RecomputedWeights`: q, k, p, e, the masks, and for each target the two numbers that make weights of scores,
  exp(s - largest) scale. Every use computes the weights again.

With either, uses leave what the gradients of q, k, p and e need to one backward, which serves them all (deferred.py,
with stored.py and recomputed.py). A backend that offers no parts of the op (launchers.py) runs the op for every use,
and the gradients of the uses add; so does every backend under torch.compile.

`rel_pos_attention` (relative.py) is one use of such weights as a function of its own, for other models' layers.

Source: section 3.2 of the Zipformer paper (arXiv:2310.11230); ``RelPositionMultiheadAttentionWeights`` and
``SelfAttention`` in upstream's ``zipformer.py``.
"""

from __future__ import annotations

from zipformer_kernels.ops.attention.budget import stores
from zipformer_kernels.ops.attention.cpu import average
from zipformer_kernels.ops.attention.deferred import part_of
from zipformer_kernels.ops.attention.held import RecomputedWeights, StoredWeights
from zipformer_kernels.ops.attention.masks import ChunkMask, downsample_mask
from zipformer_kernels.ops.attention.op import _op as _op
from zipformer_kernels.ops.attention.relative import rel_pos_attention
from zipformer_kernels.ops.attention.weights import (
    AttentionWeights,
    aggregate,
    attention_weights,
    constant_attention,
    deferred_pieces,
)
from zipformer_kernels.ops.sizes import merge_heads, split_heads

__all__ = [
    "AttentionWeights",
    "ChunkMask",
    "RecomputedWeights",
    "StoredWeights",
    "aggregate",
    "attention_weights",
    "average",
    "constant_attention",
    "deferred_pieces",
    "downsample_mask",
    "merge_heads",
    "part_of",
    "rel_pos_attention",
    "split_heads",
    "stores",
]
