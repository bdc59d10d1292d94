"""Attention weights by torch's operations: tensors of T x S elements for each head and sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.call import autocast_dtype
from zipformer_kernels.ops.attention import reference
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores


def dense(scores: Scores, masks: Masks, penalty: Penalty) -> Tensor:
    """W by torch's operations, differentiable; under autocast in the autocast dtype, as upstream stores it."""
    raw = penalized_scores(scores, penalty)
    mask = reference.forbidden(raw.shape[1:], masks, scores.q.device)
    return softmax(raw if mask is None else reference.masked(raw, mask), dim=-1)


def penalized_scores(scores: Scores, penalty: Penalty) -> Tensor:
    """The scores before masking, (H, B, T, S), whose gradient gains the penalty."""
    raw = reference.scores(*scores)
    return raw if penalty.weight == 0.0 else penalized(raw, *penalty)


def masked_mean(weights: Tensor) -> Tensor:
    """The same weight for every source that has any."""
    seen = (weights > 0.0).to(weights.dtype)
    return seen * (1.0 / seen.sum(dim=-1, keepdim=True))


def penalized(scores: Tensor, penalty: float, limit: float) -> Tensor:
    """Returns the scores; their gradient gains that of the loss ``penalty * relu(abs(scores) - limit).sum()``."""
    over = (scores > limit).to(torch.int8) - (scores < -limit).to(torch.int8)
    return gradient_hook(scores, lambda grad, over: torch.add(grad, over, alpha=penalty), over)


def softmax(x: Tensor, dim: int) -> Tensor:
    """The softmax along a dimension; under autocast in the autocast dtype, as upstream's."""
    y = x.softmax(dim)
    return y.to(autocast_dtype(x) or y.dtype)
