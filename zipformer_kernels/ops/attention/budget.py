"""Whether attention weights are small enough to be stored."""

from __future__ import annotations

import torch

from zipformer_kernels.core import tuning
from zipformer_kernels.ops.attention.launchers import AttentionLaunchers
from zipformer_kernels.ops.attention.op import _op
from zipformer_kernels.ops.attention.scores import Scores

STORED_BYTES = tuning.entry("attention.stored_bytes")
STORED_SHARE = tuning.entry("attention.stored_share")


def stores(
    heads: int, batch: int, targets: int, sources: int, dtype: torch.dtype, stored_bytes: int | None = None
) -> bool:
    """Whether weights of this shape are small enough to be stored whole on the CPU.

    Args:
        heads, batch, targets, sources, dtype: of the weights.
        stored_bytes: below how many bytes they are; by default as tuned.
    """
    limit = STORED_BYTES.value if stored_bytes is None else stored_bytes
    return heads * batch * targets * sources * dtype.itemsize < limit


def fits(backend: str, scores: Scores, stored_bytes: int | None) -> bool:
    """Whether weights made from the scores are stored on a backend: it can, and they take less than the budget.

    That is `stored_bytes`, or as tuned. On a GPU by default it is a share of the memory that the device has, not of
    what is free: so nothing waits for the device, and every step of a run makes the same choice and repeats bit for
    bit.
    """
    launchers, q = _op.backends[backend], scores.q
    if not isinstance(launchers, AttentionLaunchers) or launchers.make_weights is None:
        return False
    targets, batch, heads = q.shape[:3]
    if backend == "cpu":
        heads = max(heads - 1, 1)  # the first may lie apart
    if stored_bytes is None and q.is_cuda:
        stored_bytes = torch.cuda.get_device_properties(q.device).total_memory * STORED_SHARE.value // 1000
    return stores(heads, batch, targets, scores.k.shape[0], q.dtype, stored_bytes)
