"""Attention in two modules: the weights, computed once a layer, and their use to average values."""

from __future__ import annotations

import copy
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels.modules.scaled_init import ScaledLinear
from zipformer_kernels.modules.streaming import join_cache
from zipformer_kernels.training import (
    Balancer,
    FloatLike,
    ScheduledFloat,
    Whiten,
    penalize_abs_values_gt,
    whitening_schedule,
)
from zipformer_kernels.training.randomness import being_traced, logging_draw

# exp(-1000) is zero in every dtype, and a row with every entry masked becomes uniform rather than NaN.
MASKED_SCORE = -1000

POS_EMB_SKIP_RATE = ScheduledFloat((0.0, 0.5), (4000.0, 0.0))


class RelPositionMultiheadAttentionWeights(nn.Module):
    """Multi-head attention weights with relative positions, W = softmax(s), for several modules to share.

    s[i, j] = q_i . k_j + p_i . E[T - 1 - i + j], with q, k, p linear in x and E linear in the positional
    encoding. There is no 1 / sqrt(d): the initial scale of the projection takes its place. (Zipformer paper,
    arXiv:2310.11230, section 3.2; the positions follow Transformer-XL, arXiv:1901.02860.)

    Args:
        embed_dim: channels of x.
        pos_dim: channels of the positional encoding.
        num_heads: heads.
        query_head_dim: channels of q and of k, per head.
        pos_head_dim: channels of p, per head.
        dropout: dropout on the weights.
        pos_emb_skip_rate: how often, in training, a call leaves out the positional term.
    """

    def __init__(
        self,
        embed_dim: int,
        pos_dim: int,
        num_heads: int,
        query_head_dim: int,
        pos_head_dim: int,
        dropout: float = 0.0,
        pos_emb_skip_rate: FloatLike = POS_EMB_SKIP_RATE,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.query_head_dim = query_head_dim
        self.pos_head_dim = pos_head_dim
        self.dropout = dropout
        self.pos_emb_skip_rate = copy.deepcopy(pos_emb_skip_rate)
        self.name: str | None = None  # written by the training loop, for logs

        self.in_proj = ScaledLinear(
            embed_dim, (2 * query_head_dim + pos_head_dim) * num_heads, initial_scale=query_head_dim**-0.25
        )
        self.whiten_keys = Whiten(
            num_groups=num_heads,
            whitening_limit=whitening_schedule(3.0),
            prob=(0.025, 0.25),
            grad_scale=0.025,
        )
        # The weights do not change when a constant is added to the keys, so nothing else stops their bias
        # from drifting on roundoff.
        self.balance_keys = Balancer(
            query_head_dim * num_heads,
            channel_dim=-1,
            min_positive=0.4,
            max_positive=0.6,
            min_abs=0.0,
            max_abs=100.0,
            prob=0.025,
        )
        self.linear_pos = ScaledLinear(pos_dim, num_heads * pos_head_dim, bias=False, initial_scale=0.05)
        # Named places for diagnostics to hook into.
        self.copy_pos_query = nn.Identity()
        self.copy_query = nn.Identity()

    def forward(
        self,
        x: Tensor,
        pos_emb: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The attention weights among the frames of x.

        Args:
            x: (T, batch, embed_dim).
            pos_emb: (1 or batch, 2 T - 1, pos_dim), as `CompactRelPositionalEncoding` makes it.
            key_padding_mask: bool (batch, T), True for frames that nothing may attend to.
            attn_mask: bool (T, T) or (batch, T, T), True where target (row) may not attend to source
                (column).

        Returns:
            (heads, batch, T, T): target, then source.
        """
        q, k, p = self._project(x)
        q = self.copy_query(q)
        k = self.whiten_keys(self.balance_keys(k))
        p = self.copy_pos_query(p)
        with_positions = not self.training or random.random() >= float(self.pos_emb_skip_rate)
        scores = self._scores(q, k, p, pos_emb if with_positions else None)
        if self.training and random.random() < 0.1:
            scores = penalize_abs_values_gt(scores, limit=25.0, penalty=1.0e-04, name=self.name)

        weights = softmax(_masked(scores, attn_mask, key_padding_mask))
        if self.training or not being_traced():
            logging_draw(0.001)
        return F.dropout(weights, p=self.dropout, training=self.training)

    def streaming_forward(
        self,
        x: Tensor,
        pos_emb: Tensor,
        cached_key: Tensor,
        left_context_len: int,
        key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The attention weights of a chunk over the left context L and itself.

        Args:
            x: (T, batch, embed_dim).
            pos_emb: (1 or batch, L + 2 T - 1, pos_dim).
            cached_key: (L, batch, heads * query_head_dim).
            left_context_len: L.
            key_padding_mask: bool (batch, L + T), True for frames that nothing may attend to.

        Returns:
            The weights, (heads, batch, T, L + T), and the next `cached_key`.
        """
        q, k, p = self._project(x)
        k, cached_key = join_cache("cached_key", cached_key, k, left_context_len, dim=0)
        scores = self._scores(q, k, p, pos_emb)
        return _masked(scores, None, key_padding_mask).softmax(dim=-1), cached_key

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_dim, pos_dim = self.num_heads * self.query_head_dim, self.num_heads * self.pos_head_dim
        return self.in_proj(x).split([query_dim, query_dim, pos_dim], dim=-1)

    def _scores(self, q: Tensor, k: Tensor, p: Tensor, pos_emb: Tensor | None) -> Tensor:
        """The scores before masking, (heads, batch, frames of q, frames of k); None leaves positions out."""
        scores = split_heads(q, self.num_heads) @ split_heads(k, self.num_heads).transpose(2, 3)
        if pos_emb is None:
            return scores
        frames, keys = q.shape[0], k.shape[0]
        if pos_emb.shape[1] != frames + keys - 1:
            raise ValueError(
                f"pos_emb: wanted {frames + keys - 1} offsets for {frames} frames over {keys} keys, "
                f"got {tuple(pos_emb.shape)}"
            )
        positions = self.linear_pos(pos_emb).unflatten(2, (self.num_heads, self.pos_head_dim))
        by_offset = split_heads(p, self.num_heads) @ positions.permute(2, 0, 3, 1)
        return scores + select_relative(by_offset)


class SelfAttention(nn.Module):
    """Averages values, linear in x, with given attention weights, and projects back.

    Args:
        embed_dim: channels of x and of the result.
        num_heads: heads of the weights.
        value_head_dim: channels of the values, per head.
    """

    def __init__(self, embed_dim: int, num_heads: int, value_head_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(embed_dim, num_heads * value_head_dim, bias=True)
        self.out_proj = ScaledLinear(num_heads * value_head_dim, embed_dim, initial_scale=0.05)
        self.whiten = Whiten(
            num_groups=1,
            whitening_limit=whitening_schedule(7.5, ratio=3.0),
            prob=(0.025, 0.25),
            grad_scale=0.01,
        )

    def forward(self, x: Tensor, attn_weights: Tensor) -> Tensor:
        """Averages over the frames of x.

        Args:
            x: (T, batch, embed_dim).
            attn_weights: (heads, batch, T, T).

        Returns:
            (T, batch, embed_dim).
        """
        return self.whiten(self.out_proj(aggregate(attn_weights, self.in_proj(x))))

    def streaming_forward(
        self, x: Tensor, attn_weights: Tensor, cached_val: Tensor, left_context_len: int
    ) -> tuple[Tensor, Tensor]:
        """Averages over the left context L and the frames of x.

        Args:
            x: (T, batch, embed_dim).
            attn_weights: (heads, batch, T, L + T).
            cached_val: (L, batch, heads * value_head_dim).
            left_context_len: L.

        Returns:
            (T, batch, embed_dim), and the next `cached_val`.
        """
        values, cached_val = join_cache("cached_val", cached_val, self.in_proj(x), left_context_len, dim=0)
        return self.out_proj(aggregate(attn_weights, values)), cached_val


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """From (T, batch, heads * channels) to (heads, batch, T, channels)."""
    return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).permute(2, 1, 0, 3)


def merge_heads(x: Tensor) -> Tensor:
    """From (heads, batch, T, channels) to (T, batch, heads * channels)."""
    return x.permute(2, 1, 0, 3).flatten(2)


def aggregate(weights: Tensor, values: Tensor) -> Tensor:
    """For each head the average of the values with the weights.

    Args:
        weights: (heads, batch, targets, sources).
        values: (sources, batch, heads * channels).

    Returns:
        (targets, batch, heads * channels).
    """
    heads, batch, _, sources = weights.shape
    if values.shape[:2] != (sources, batch) or values.shape[2] % heads:
        raise ValueError(
            f"attn_weights: {tuple(weights.shape)} (heads, batch, targets, sources) do not fit "
            f"values of shape {tuple(values.shape)} (sources, batch, channels)"
        )
    return merge_heads(weights @ split_heads(values, heads))


def constant_attention(weights: Tensor) -> Tensor:
    """The same weight for every source that has any: a masked mean, for NonlinAttention's
    const_attention_rate.

    Args:
        weights: (heads, batch, targets, sources).

    Returns:
        Of the same shape and dtype.
    """
    seen = (weights > 0.0).to(weights.dtype)
    return seen * (1.0 / seen.sum(dim=-1, keepdim=True))


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; under autocast the weights are kept in the autocast dtype."""
    weights = scores.softmax(dim=-1)
    device = scores.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return weights.to(torch.get_autocast_dtype(device))
    return weights


def select_relative(by_offset: Tensor) -> Tensor:
    """From scores by offset to scores by key: ``out[..., i, j] = by_offset[..., i, T - 1 - i + j]``.

    With n offsets the wanted element lies at T - 1 + i (n - 1) + j of the flattened rows: rows of n - 1
    elements, from the one at T - 1 on. So the result is a view, and the same code runs, trains and exports.

    Args:
        by_offset: (..., T, n), n = T + keys - 1; column 0 is the key furthest to the left of the last frame.

    Returns:
        (..., T, keys).
    """
    frames, offsets = by_offset.shape[-2:]
    if frames == 1:
        return by_offset
    keys = offsets - frames + 1
    rows = by_offset.flatten(-2).narrow(-1, frames - 1, frames * (offsets - 1))
    return rows.unflatten(-1, (frames, offsets - 1))[..., :keys]


def _masked(scores: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    """The scores with those of forbidden pairs set to MASKED_SCORE; True in a mask forbids."""
    _, batch, targets, sources = scores.shape
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, [(targets, sources), (batch, targets, sources)])
        scores = scores.masked_fill(attn_mask, MASKED_SCORE)
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [(batch, sources)])
        scores = scores.masked_fill(key_padding_mask.unsqueeze(1), MASKED_SCORE)
    return scores


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(
            f"{name}: wanted a bool tensor of shape {wanted}, got {mask.dtype} {tuple(mask.shape)}"
        )
