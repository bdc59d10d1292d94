"""What a backend offers of attention beside the op: its parts, so that one backward serves all uses of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from zipformer_kernels.core.op import Launchers


@dataclass(frozen=True, kw_only=True)
class AttentionLaunchers(Launchers):
    """Launchers of the op ``attention``, and its parts. On a backend without these every use of weights is one op.

    Scores, softmax rows, masks and penalties are as in ``scores.py``, all of the heads concerned; values are
    (S, B, H, C), results and their gradients (T, B, H, C), of unit or other strides.

    Attributes:
        average_values: ``(scores, softmax, masks, values)`` -> W V.
        gated_average: ``(scores, softmax, masks, values, y)`` -> W V and (W V) y, y as W V is. None on a backend that
            takes two steps.
        values_gradient: ``(scores, softmax, masks, grad)`` -> W^T G, (S, B, H, C).
        scores_gradients: ``(needs, scores, softmax, masks, penalty, uses)`` -> the gradients of q, k, p and e, None
            where `needs` says that they are not wanted; of all `uses` at once, each a
            `zipformer_kernels.ops.attention.scores.Use`.
        make_weights: ``(q, k, p, e, *masks, *penalty)`` -> (W,), (H, B, T, S) in the dtype of q. None on a backend that
            always computes weights again.
        weights_gradients: ``(needs, pieces, scores, masks, penalty)`` -> as `scores_gradients`, from pieces of W: each
            which heads, W, the gradient dW or None, and V, O and G of every use. None as above.
    """

    average_values: Callable[..., Tensor]
    values_gradient: Callable[..., Tensor]
    scores_gradients: Callable[..., list[Tensor | None]]
    gated_average: Callable[..., tuple[Tensor, Tensor]] | None = None
    make_weights: Callable[..., tuple[Tensor]] | None = None
    weights_gradients: Callable[..., list[Tensor | None]] | None = None
