"""Attention in two modules: the weights, computed once a layer, and their use to average values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.branch.middles.attention import AverageMiddle
from zipformer_kernels.branch.node import Plan, Site, acting
from zipformer_kernels.branch.plain import made_of, takes
from zipformer_kernels.core.call import being_traced
from zipformer_kernels.core.joint import split
from zipformer_kernels.core.module import Module
from zipformer_kernels.core.op import SettledBackend
from zipformer_kernels.modules.scaled_init import ScaledLinear
from zipformer_kernels.modules.streaming import average_chunk, check_cache, join_cache
from zipformer_kernels.ops.attention import (
    AttentionWeights,
    ChunkMask,
    aggregate,
    attention_weights,
    average,
    deferred_pieces,
    part_of,
    stores,
)
from zipformer_kernels.ops.sizes import split_last
from zipformer_kernels.training import Balancer, FloatLike, ScheduledFloat, Whiten, whitening_schedule
from zipformer_kernels.training.randomness import happens, logging_draw, logging_draw_unrecorded

# Scores beyond the limit are implausible; in a tenth of the training calls their gradient gains this penalty, which is
# not scaled by the loss scale of mixed precision.
SCORE_LIMIT = 25.0
SCORE_PENALTY = 1.0e-04


def given_mask(
    mask: Tensor | ChunkMask | None, x: Tensor, module: nn.Module, *kinds: type[nn.Module]
) -> Tensor | ChunkMask | None:
    """The mask as a module takes it: those classes of ours take a rule, all else a tensor, for the frames of x."""
    if not isinstance(mask, ChunkMask) or takes(module, *kinds):
        return mask
    return mask.materialize(x.shape[0], x.device)


Projection = Callable[..., tuple[Tensor, Tensor]]
"""``(linear, x, passes=True)`` -> what a linear module makes of x, and x for its other uses, if it has any."""


def called(linear: nn.Module, x: Tensor, passes: bool = True) -> tuple[Tensor, Tensor]:
    """The projection by a call of the module."""
    return linear(x), x


POS_EMB_SKIP_RATE = ScheduledFloat((0.0, 0.5), (4000.0, 0.0))


@made_of(
    {"copy_query": nn.Identity, "copy_pos_query": nn.Identity, "balance_keys": Balancer, "whiten_keys": Whiten},
    calls_parts=True,  # `handle` does
    in_proj=nn.Linear,
    linear_pos=nn.Linear,
)
class RelPositionMultiheadAttentionWeights(Module):
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

    Attributes:
        stored_bytes: below how many bytes the weights are stored, as of `AttentionWeights`; None, unless it is set: as
            tuned.
    """

    stored_bytes: int | None = None  # of the class: upstream's modules have none

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
        attn_mask: Tensor | ChunkMask | None = None,
    ) -> Tensor:
        """The attention weights among the frames of x.

        Args:
            x: (T, batch, embed_dim).
            pos_emb: (1 or batch, 2 T - 1, pos_dim), as `CompactRelPositionalEncoding` makes it.
            key_padding_mask: bools or integers (batch, T), True for frames that nothing may attend to.
            attn_mask: bool (T, T) or (batch, T, T), True where target (row) may not attend to source
                (column); or the rule of such a mask.

        Returns:
            (heads, batch, T, T): target, then source.
        """
        weights, _ = self.handle(x, pos_emb, key_padding_mask, attn_mask)
        return weights if isinstance(weights, Tensor) else weights.materialize()

    def handle(
        self,
        x: Tensor,
        pos_emb: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | ChunkMask | None = None,
        project: Projection | None = None,
    ) -> tuple[AttentionWeights | Tensor, Tensor]:
        """The weights as a handle that averages values, and x for all that uses it further.

        It takes the place of a call where nobody has wrapped the module: wrappers, such as FSDP's and those that
        recompute, look for tensors in what a module returns. Where there is dropout on the weights they are a tensor.

        Args:
            x, pos_emb, key_padding_mask, attn_mask: as of `forward`.
            project: computes the projections; None: their modules, which are called.
        """
        projected, x = (project or called)(self.in_proj, x)
        q, k, p = split(projected, self._widths())
        q = self.copy_query(q)
        k = self.whiten_keys(self.balance_keys(k))
        p = self.copy_pos_query(p)
        with_positions = not (self.training and happens(self.pos_emb_skip_rate))
        penalty = 0.0
        if self.training and happens(0.1):
            logging_draw(0.002)
            penalty = SCORE_PENALTY
        weights = self._weights(
            q, k, p, pos_emb if with_positions else None, key_padding_mask, attn_mask, penalty, SCORE_LIMIT, project
        )
        logging_draw(0.001)
        if self.training and self.dropout > 0.0:
            return F.dropout(weights.materialize(), p=self.dropout), x
        return weights, x

    def streaming_forward(
        self,
        x: Tensor,
        pos_emb: Tensor,
        cached_key: Tensor,
        left_context_len: int,
        key_padding_mask: Tensor | None,
    ) -> tuple[AttentionWeights, Tensor]:
        """The attention weights of a chunk over the left context L and itself.

        Args:
            x: (T, batch, embed_dim).
            pos_emb: (1 or batch, L + 2 T - 1, pos_dim).
            cached_key: (L, batch, heads * query_head_dim).
            left_context_len: L.
            key_padding_mask: bools or integers (batch, L + T), True for frames that nothing may attend to.

        Returns:
            The weights, (heads, batch, T, L + T), and the next `cached_key`.
        """
        q, k, p = split(self.in_proj(x), self._widths())
        k, cached_key = join_cache("cached_key", cached_key, k, left_context_len, dim=0)
        return self._weights(q, k, p, pos_emb, key_padding_mask), cached_key

    def tensor(
        self,
        backend: SettledBackend,
        x: Tensor,
        pos_emb: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | ChunkMask | None = None,
        cached_key: Tensor | None = None,
        left_context_len: int = 0,
    ) -> tuple[Tensor, Tensor | None] | None:
        """The weights themselves, without gradients and calls of parts, on a backend that was settled.

        Args:
            x, pos_emb, key_padding_mask, attn_mask: as of `forward`, or of `streaming_forward`.
            cached_key, left_context_len: in a stream.

        Returns:
            (heads, batch, T, L + T), and the next `cached_key`; or None where they are too large to be stored.
        """
        frames, batch, _ = x.shape
        if not stores(self.num_heads, batch, frames, left_context_len + frames, x.dtype, self.stored_bytes):
            return None
        q, k, p = self._split(F.linear(x, self.in_proj.weight, self.in_proj.bias))
        if cached_key is not None:
            k, cached_key = join_cache("cached_key", cached_key, k, left_context_len, dim=0)
        self._check_positions(pos_emb, frames, k.shape[0])
        e = F.linear(pos_emb, self.linear_pos.weight)
        q, k, p, e = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, p, e))
        e = e[0] if e.shape[0] == 1 else e
        if cached_key is None:
            logging_draw_unrecorded()  # a stream has none
        return attention_weights(q, k, p, e, key_padding_mask, attn_mask, backend=backend), cached_key

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        return projected.split(self._widths(), dim=2)

    def _widths(self) -> list[int]:
        query_dim, pos_dim = self.num_heads * self.query_head_dim, self.num_heads * self.pos_head_dim
        return [query_dim, query_dim, pos_dim]

    @staticmethod
    def _check_positions(pos_emb: Tensor, targets: int, sources: int) -> None:
        offsets = targets + sources - 1
        if pos_emb.shape[1] != offsets:
            raise ValueError(
                f"pos_emb: wanted {offsets} offsets for {targets} frames over {sources} keys, "
                f"got {tuple(pos_emb.shape)}"
            )

    def _weights(
        self,
        q: Tensor,
        k: Tensor,
        p: Tensor,
        pos_emb: Tensor | None,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | ChunkMask | None = None,
        penalty: float = 0.0,
        limit: float = 0.0,
        project: Projection | None = None,
    ) -> AttentionWeights:
        """The handle over flat q, k, p, (frames, batch, heads * channels); None for `pos_emb` leaves positions out."""
        q, k, p = (split_last(x, self.num_heads) for x in (q, k, p))
        rest = key_padding_mask, attn_mask, penalty, limit
        if pos_emb is None:
            return AttentionWeights(q, k, None, None, *rest, stored_bytes=self.stored_bytes)
        self._check_positions(pos_emb, q.shape[0], k.shape[0])
        if pos_emb.shape[0] == 1 and being_traced():  # to flatten 1 x n rows ties torch.export to some lengths
            pos_emb = pos_emb[0]
        e = split_last((project or called)(self.linear_pos, pos_emb, passes=False)[0], self.num_heads)
        e = e.squeeze(0) if e.ndim == 4 and e.shape[0] == 1 else e  # backward of e[0] would be a launch
        return AttentionWeights(q, k, p, e, *rest, stored_bytes=self.stored_bytes)


@made_of({"whiten": Whiten}, in_proj=nn.Linear, out_proj=nn.Linear)
class SelfAttention(Branch):
    """Averages values, linear in x, with given attention weights, and projects back.

    Args:
        embed_dim: channels of x and of the result.
        num_heads: heads of the weights.
        value_head_dim: channels of the values, per head.
    """

    defers_bias = False  # values are read by a product
    takes_handles = True

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

    def forward(self, x: Tensor, attn_weights: AttentionWeights | Tensor) -> Tensor:
        """Averages over the frames of x.

        Args:
            x: (T, batch, embed_dim).
            attn_weights: (heads, batch, T, T).

        Returns:
            (T, batch, embed_dim).
        """
        return self.whiten(self.out_proj(self.middle(self.in_proj(x), None, attn_weights)[0]))

    def streaming_forward(
        self, x: Tensor, attn_weights: AttentionWeights | Tensor, cached_val: Tensor, left_context_len: int
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
        x, cached_val = self.middle(self.in_proj(x), cached_val, attn_weights, left_context_len)
        return self.out_proj(x), cached_val

    def middle(
        self,
        hidden: Tensor,
        state: Tensor | None,
        attn_weights: AttentionWeights | Tensor,
        left_context_len: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        if state is not None:
            hidden, state = join_cache("cached_val", state, hidden, left_context_len, dim=0)
        return aggregate(attn_weights, hidden), state

    def plan(self, site: Site, attn_weights: AttentionWeights | Tensor, left_context_len: int = 0) -> Plan | None:
        pieces = deferred_pieces(attn_weights, site.low)
        if not pieces:
            return None
        whiten = self.whiten.change(site.result or any(piece.trained for piece in pieces), site.shape[2])
        middle = AverageMiddle(tuple(map(part_of, pieces)), attn_weights.shape[0])
        return Plan(middle, [x for piece in pieces for x in piece.tensors], acting(whiten))

    def in_place(
        self,
        backend: SettledBackend,
        hidden: Tensor,
        state: Tensor | None,
        attn_weights: AttentionWeights | Tensor,
        left_context_len: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attn_weights, Tensor):
            return self.middle(hidden, state, attn_weights, left_context_len)
        if state is not None:
            hidden, state = join_cache("cached_val", state, hidden, left_context_len, dim=0)
        return average(attn_weights, hidden), state

    def one_kernel(
        self,
        backend: SettledBackend,
        src: Tensor,
        state: Tensor | None,
        attn_weights: AttentionWeights | Tensor,
        left_context_len: int = 0,
    ) -> tuple[Tensor, Tensor] | None:
        if state is None:
            return None
        check_cache("cached_val", state, left_context_len, dim=0)
        return average_chunk(backend, self, src, attn_weights, state, gated=False)
