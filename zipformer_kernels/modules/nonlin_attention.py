"""NonlinAttention: a gated module that averages over time with the weights of the first attention head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels.branch.plain import made_of, plain_part
from zipformer_kernels.core.joint import split
from zipformer_kernels.core.launch import few_rows
from zipformer_kernels.modules.inference import add_product
from zipformer_kernels.modules.module import Module
from zipformer_kernels.modules.scaled_init import ScaledLinear
from zipformer_kernels.modules.streaming import average_chunk, check_cache, join_cache
from zipformer_kernels.ops.attention import AttentionWeights, StoredWeights, aggregate, merge_heads, split_heads
from zipformer_kernels.ops.nonlin_attention import nonlin_attention
from zipformer_kernels.ops.nonlin_attention.infer import infer_nonlin_attention
from zipformer_kernels.training import Balancer, ScheduledFloat, Whiten, whitening_schedule


@made_of(
    {
        "balancer": Balancer,
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
class NonlinAttention(Module):
    """out_proj((W (x * tanh(s))) * y), where s, x, y are the three thirds of in_proj(src).

    (Zipformer paper, arXiv:2310.11230, section 3.1, figure 3.)

    Args:
        channels: channels of src and of the result.
        hidden_channels: channels of each of s, x, y.
    """

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
        return self.whiten2(self.out_proj(self.identity3(self._attend(x, attn_weights))))

    def add_to(self, src: Tensor, attn_weights: AttentionWeights | Tensor, over: bool) -> Tensor:
        """src + self(src, attn_weights) in inference; see `zipformer_kernels.modules.inference`."""
        if isinstance(attn_weights, AttentionWeights) and not isinstance(attn_weights.held, StoredWeights):
            x = self._attend(src, attn_weights)
        else:
            weights = attn_weights.materialize() if isinstance(attn_weights, AttentionWeights) else attn_weights
            x = infer_nonlin_attention(F.linear(src, self.in_proj.weight), self.in_proj.bias, weights)
        return add_product(src, x, self.out_proj.weight, self.out_proj.bias, over)

    def _attend(self, x: Tensor, attn_weights: AttentionWeights | Tensor) -> Tensor:
        """All but the last layer."""
        s, x, y = split(self.in_proj(x), [self.hidden_channels] * 3)
        s = self.balancer(s)
        x = self.whiten1(x)
        y = self.identity2(y)
        gates = plain_part(self, "tanh") and plain_part(self, "identity1")
        if gates and isinstance(attn_weights, AttentionWeights):
            return nonlin_attention(attn_weights, s, x, y)
        return y * aggregate(attn_weights, self.identity1(x * self.tanh(s)))

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
        s, x, y = self.in_proj(x).chunk(3, dim=2)
        gated = x * self.tanh(s)
        values, cache = join_cache("cached_x", merge_heads(cached_x), gated, left_context_len, dim=0)
        x = self.out_proj(aggregate(attn_weights, values) * y)
        return x, split_heads(cache, attn_weights.shape[0])

    def add_chunk_to(
        self, src: Tensor, attn_weights: AttentionWeights | Tensor, cached_x: Tensor, left_context_len: int
    ) -> tuple[Tensor, Tensor]:
        """src + self.streaming_forward(src, ...) in inference, and the next `cached_x`."""
        if not few_rows(src):
            x, cached_x = self.streaming_forward(src, attn_weights, cached_x, left_context_len)
            return src + x, cached_x
        check_cache("cached_x", cached_x, left_context_len, dim=2)
        src, cache = average_chunk(self, src, attn_weights, merge_heads(cached_x), gated=True)
        return src, split_heads(cache, attn_weights.shape[0])
