"""NonlinAttention: a gated module that averages over time with the weights of the first attention head."""

from __future__ import annotations

from torch import Tensor, nn

from zipformer_kernels.branch.branch import Branch
from zipformer_kernels.branch.middles.nonlin_attention import GatedMiddle
from zipformer_kernels.branch.node import Plan, Site, acting
from zipformer_kernels.branch.plain import When, balancer, made_of, plain_parts
from zipformer_kernels.core.joint import split
from zipformer_kernels.core.op import SettledBackend
from zipformer_kernels.modules.scaled_init import ScaledLinear
from zipformer_kernels.modules.streaming import average_chunk, check_cache, join_cache
from zipformer_kernels.ops.attention import (
    AttentionWeights,
    aggregate,
    deferred_pieces,
    merge_heads,
    part_of,
    split_heads,
)
from zipformer_kernels.ops.nonlin_attention import gates_of, nonlin_attention
from zipformer_kernels.ops.nonlin_attention.infer import infer_nonlin_attention
from zipformer_kernels.training import Balancer, ScheduledFloat, Whiten, whitening_schedule


@made_of(
    {
        "balancer": balancer(-1),
        "identity1": nn.Identity,
        "identity2": nn.Identity,
        "identity3": nn.Identity,
        "whiten1": Whiten,
        "whiten2": Whiten,
    },
    in_proj=nn.Linear,
    tanh=nn.Tanh,
    out_proj=nn.Linear,
)
class NonlinAttention(Branch):
    """out_proj((W (x * tanh(s))) * y), where s, x, y are the three thirds of in_proj(src).

    (Zipformer paper, arXiv:2310.11230, section 3.1, figure 3.)

    Args:
        channels: channels of src and of the result.
        hidden_channels: channels of each of s, x, y.
    """

    takes_handles = True

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.in_proj = nn.Linear(channels, hidden_channels * 3, bias=True)
        # Before the gate; well-trained gates have large inputs, hence the large min_abs.
        self.balancer = Balancer(
            hidden_channels,
            channel_dim=-1,
            min_positive=ScheduledFloat((0.0, 0.25), (20000.0, 0.05)),
            max_positive=ScheduledFloat((0.0, 0.75), (20000.0, 0.95)),
            min_abs=0.5,
            max_abs=5.0,
        )
        self.tanh = nn.Tanh()
        # Named places for diagnostics to hook into.
        self.identity1 = nn.Identity()
        self.identity2 = nn.Identity()
        self.identity3 = nn.Identity()
        self.out_proj = ScaledLinear(hidden_channels, channels, bias=True, initial_scale=0.05)
        self.whiten1 = Whiten(
            num_groups=1, whitening_limit=whitening_schedule(5.0), prob=(0.025, 0.25), grad_scale=0.01
        )
        self.whiten2 = Whiten(
            num_groups=1,
            whitening_limit=whitening_schedule(5.0, ratio=3.0),
            prob=(0.025, 0.25),
            grad_scale=0.01,
        )

    def forward(self, x: Tensor, attn_weights: AttentionWeights | Tensor) -> Tensor:
        """Offline or chunk-causal, as the weights have it.

        Args:
            x: (T, batch, channels).
            attn_weights: (heads, batch, T, T), of one head in the encoder.

        Returns:
            (T, batch, channels).
        """
        return self.whiten2(self.out_proj(self.middle(self.in_proj(x), None, attn_weights)[0]))

    def streaming_forward(
        self, x: Tensor, attn_weights: AttentionWeights | Tensor, cached_x: Tensor, left_context_len: int
    ) -> tuple[Tensor, Tensor]:
        """Averages over the left context L and the frames of x.

        Args:
            x: (T, batch, channels).
            attn_weights: (heads, batch, T, L + T).
            cached_x: (heads, batch, L, hidden_channels / heads).
            left_context_len: L.

        Returns:
            (T, batch, channels), and the next `cached_x`.
        """
        x, cached_x = self.middle(self.in_proj(x), cached_x, attn_weights, left_context_len)
        return self.out_proj(x), cached_x

    def middle(
        self,
        hidden: Tensor,
        state: Tensor | None,
        attn_weights: AttentionWeights | Tensor,
        left_context_len: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        if state is None:
            return self.identity3(self._attend(hidden, attn_weights)), None
        s, x, y = hidden.chunk(3, dim=2)
        gated = x * self.tanh(s)
        values, cache = join_cache("cached_x", merge_heads(state), gated, left_context_len, dim=0)
        return aggregate(attn_weights, values) * y, split_heads(cache, attn_weights.shape[0])

    def _attend(self, projected: Tensor, attn_weights: AttentionWeights | Tensor) -> Tensor:
        """The gated average of whole sequences: one op, where it may leave out the calls of the gate."""
        s, x, y = split(projected, [self.hidden_channels] * 3)
        s = self.balancer(s)
        x = self.whiten1(x)
        y = self.identity2(y)
        gates = plain_parts(self, When.ANY) >= {"tanh", "identity1"}
        if gates and isinstance(attn_weights, AttentionWeights):
            return nonlin_attention(attn_weights, s, x, y)
        return y * aggregate(attn_weights, self.identity1(x * self.tanh(s)))

    def plan(self, site: Site, attn_weights: AttentionWeights | Tensor, left_context_len: int = 0) -> Plan | None:
        hidden, pieces = self.hidden_channels, deferred_pieces(attn_weights, site.low)
        if len(pieces) != 1:
            return None
        gate, value = self.balancer.change(site.hidden, hidden), self.whiten1.change(site.hidden, hidden)
        whiten = self.whiten2.change(site.result or pieces[0].trained, site.shape[2])
        middle = GatedMiddle(gates_of(attn_weights.backend), part_of(pieces[0]), gate, value)
        return Plan(middle, pieces[0].tensors, acting(whiten))

    def in_place(
        self,
        backend: SettledBackend,
        hidden: Tensor,
        state: Tensor | None,
        attn_weights: AttentionWeights | Tensor,
        left_context_len: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        bias = self.in_proj.bias
        if state is None and isinstance(attn_weights, Tensor):
            return infer_nonlin_attention(hidden, bias, attn_weights, backend=backend), None
        hidden = hidden if bias is None else hidden.add_(bias)
        if state is not None:
            return self.middle(hidden, state, attn_weights, left_context_len)
        return nonlin_attention(attn_weights, *hidden.chunk(3, dim=2)), None

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
        check_cache("cached_x", state, left_context_len, dim=2)
        heads = attn_weights.shape[0]
        context = state.permute(2, 1, 0, 3).flatten(2)
        src, cache = average_chunk(backend, self, src, attn_weights, context, gated=True)
        return src, cache.unflatten(2, (heads, -1)).permute(2, 1, 0, 3)
