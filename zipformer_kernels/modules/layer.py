"""One layer: attention weights that three modules share, feed-forwards, convolutions and bypasses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_kernels.branch.plain import When, balancer, made_of, plain_parts
from zipformer_kernels.branch.run import Run, State
from zipformer_kernels.core.module import Module
from zipformer_kernels.modules.attention import RelPositionMultiheadAttentionWeights, SelfAttention, given_mask
from zipformer_kernels.modules.bias_norm import BiasNorm
from zipformer_kernels.modules.bypass import BypassModule, norm_and_bypass
from zipformer_kernels.modules.convolution import ConvolutionModule
from zipformer_kernels.modules.feedforward import FeedforwardModule
from zipformer_kernels.modules.nonlin_attention import NonlinAttention
from zipformer_kernels.ops.attention import AttentionWeights, ChunkMask, constant_attention
from zipformer_kernels.training import Balancer, FloatLike, ScheduledFloat, Whiten, whitening_schedule
from zipformer_kernels.training.randomness import all_ones, happens

DYNAMIC_SKIP_RATE = ScheduledFloat((0.0, 0.2), (4000.0, 0.05), (16000, 0.0), default=0)
CONST_ATTENTION_RATE = ScheduledFloat((0.0, 0.25), (4000.0, 0.025), default=0)
FEEDFORWARD_SKIP_RATE = ScheduledFloat((0.0, 0.1), (4000.0, 0.01), (50000.0, 0.0))
BYPASS_SKIP_RATE = ScheduledFloat((0.0, 0.5), (4000.0, 0.02), default=0)


@made_of(
    {
        "balancer1": balancer(-1),
        "balancer2": balancer(-1),
        "balancer_na": balancer(-1),
        "balancer_ff2": balancer(-1),
        "balancer_ff3": balancer(-1),
        "whiten": Whiten,
    },
    bypass=BypassModule,
    bypass_mid=BypassModule,
    self_attn_weights=RelPositionMultiheadAttentionWeights,
    self_attn1=SelfAttention,
    self_attn2=SelfAttention,
    feed_forward1=FeedforwardModule,
    feed_forward2=FeedforwardModule,
    feed_forward3=FeedforwardModule,
    nonlin_attention=NonlinAttention,
    conv_module1=ConvolutionModule,
    conv_module2=ConvolutionModule,
    norm=BiasNorm,
)
class ZipformerEncoderLayer(Module):
    """One layer of a stack; see figure 2 of the Zipformer paper, arXiv:2310.11230.

    Each module's result is added to src; a bypass in the middle and one at the end mix in the layer's input.

    Args:
        embed_dim: channels of src.
        pos_dim: channels of the positional encoding.
        num_heads: attention heads.
        query_head_dim, pos_head_dim, value_head_dim: channels per head of queries and keys, of positional
            queries, and of values.
        feedforward_dim: hidden channels of the second feed-forward; the first has 3/4 and the third 5/4 of
            them.
        dropout: dropout in the feed-forward modules.
        cnn_module_kernel: odd width of the depthwise convolutions.
        causal: use chunk-causal convolutions.
        attention_skip_rate: the probability, in training, that a sequence skips the modules that use
            attention.
        conv_skip_rate, ff2_skip_rate, ff3_skip_rate: the same for a convolution, for the second and for the
            third feed-forward.
        const_attention_rate: the probability, in training, that NonlinAttention gets constant weights.
        bypass_skip_rate: the probability, in training, that a sequence skips the layer.
    """

    const_attention_in_training = True  # recipes copied before March 2024 draw it in evaluation instead
    use_conv = True  # ZipVoice can do without convolution modules

    def __init__(
        self,
        embed_dim: int,
        pos_dim: int,
        num_heads: int,
        query_head_dim: int,
        pos_head_dim: int,
        value_head_dim: int,
        feedforward_dim: int,
        dropout: FloatLike = 0.1,
        cnn_module_kernel: int = 31,
        causal: bool = False,
        attention_skip_rate: FloatLike = DYNAMIC_SKIP_RATE,
        conv_skip_rate: FloatLike = DYNAMIC_SKIP_RATE,
        const_attention_rate: FloatLike = CONST_ATTENTION_RATE,
        ff2_skip_rate: FloatLike = FEEDFORWARD_SKIP_RATE,
        ff3_skip_rate: FloatLike = FEEDFORWARD_SKIP_RATE,
        bypass_skip_rate: FloatLike = BYPASS_SKIP_RATE,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.bypass = BypassModule(embed_dim, skip_rate=bypass_skip_rate, straight_through_rate=0)
        self.bypass_mid = BypassModule(embed_dim, straight_through_rate=0)

        self.attention_skip_rate = copy.deepcopy(attention_skip_rate)
        self.conv_skip_rate = copy.deepcopy(conv_skip_rate)
        self.ff2_skip_rate = copy.deepcopy(ff2_skip_rate)
        self.ff3_skip_rate = copy.deepcopy(ff3_skip_rate)
        self.const_attention_rate = copy.deepcopy(const_attention_rate)

        self.self_attn_weights = RelPositionMultiheadAttentionWeights(
            embed_dim,
            pos_dim=pos_dim,
            num_heads=num_heads,
            query_head_dim=query_head_dim,
            pos_head_dim=pos_head_dim,
            dropout=0.0,
        )
        self.self_attn1 = SelfAttention(embed_dim, num_heads, value_head_dim)
        self.self_attn2 = SelfAttention(embed_dim, num_heads, value_head_dim)
        self.feed_forward1 = FeedforwardModule(embed_dim, (feedforward_dim * 3) // 4, dropout)
        self.feed_forward2 = FeedforwardModule(embed_dim, feedforward_dim, dropout)
        self.feed_forward3 = FeedforwardModule(embed_dim, (feedforward_dim * 5) // 4, dropout)
        self.nonlin_attention = NonlinAttention(embed_dim, hidden_channels=3 * embed_dim // 4)
        self.conv_module1 = ConvolutionModule(embed_dim, cnn_module_kernel, causal=causal)
        self.conv_module2 = ConvolutionModule(embed_dim, cnn_module_kernel, causal=causal)
        self.bypass_scale = nn.Parameter(torch.full((embed_dim,), 0.5))  # unused; checkpoints have it
        self.norm = BiasNorm(embed_dim)

        self.balancer1 = Balancer(
            embed_dim,
            channel_dim=-1,
            min_positive=0.45,
            max_positive=0.55,
            min_abs=0.2,
            max_abs=4.0,
        )
        self.balancer_na = Balancer(
            embed_dim,
            channel_dim=-1,
            min_positive=0.3,
            max_positive=0.7,
            min_abs=ScheduledFloat((0.0, 0.004), (4000.0, 0.02)),
            prob=0.05,
        )
        # Keeps the feed-forward's result from staying too small beside what it is added to: rarely needed.
        self.balancer_ff2 = Balancer(
            embed_dim,
            channel_dim=-1,
            min_positive=0.3,
            max_positive=0.7,
            min_abs=ScheduledFloat((0.0, 0.0), (4000.0, 0.1), default=0.0),
            max_abs=2.0,
            prob=0.05,
        )
        self.balancer_ff3 = Balancer(
            embed_dim,
            channel_dim=-1,
            min_positive=0.3,
            max_positive=0.7,
            min_abs=ScheduledFloat((0.0, 0.0), (4000.0, 0.2), default=0.0),
            max_abs=4.0,
            prob=0.05,
        )
        self.whiten = Whiten(
            num_groups=1,
            whitening_limit=whitening_schedule(4.0, ratio=3.0),
            prob=(0.025, 0.25),
            grad_scale=0.01,
        )
        self.balancer2 = Balancer(
            embed_dim,
            channel_dim=-1,
            min_positive=0.45,
            max_positive=0.55,
            min_abs=0.1,
            max_abs=4.0,
        )

    def forward(
        self,
        src: Tensor,
        pos_emb: Tensor,
        chunk_size: int = -1,
        attn_mask: Tensor | ChunkMask | None = None,
        src_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Offline or chunk-causal.

        Args:
            src: (T, batch, embed_dim).
            pos_emb: (1 or batch, 2 T - 1, pos_dim).
            chunk_size: frames per chunk of the convolutions; -1 for no chunks.
            attn_mask: bool (T, T) or (batch, T, T), True where target (row) may not attend to source
                (column).
            src_key_padding_mask: bools or integers (batch, T), True for padding.

        Returns:
            (T, batch, embed_dim).
        """
        return self._run_offline(src, pos_emb, attn_mask, src_key_padding_mask, {"chunk_size": chunk_size})

    def _run_offline(
        self,
        src: Tensor,
        pos_emb: Tensor,
        attn_mask: Tensor | ChunkMask | None,
        src_key_padding_mask: Tensor | None,
        chunks: dict[str, int],
        time_emb: Tensor | None = None,
    ) -> Tensor:
        """`forward`, and that of `TimedEncoderLayer`, where there are no chunks but an embedding of the time."""
        attn_mask = given_mask(attn_mask, src, self.self_attn_weights, RelPositionMultiheadAttentionWeights)
        mask = attn_mask if isinstance(attn_mask, Tensor) else None
        run = Run(self, src, (pos_emb, time_emb), (mask, src_key_padding_mask))
        # A rate is read before its module runs, so that numbers are drawn in upstream's order.
        skip_rate = run.rate(self.attention_skip_rate)
        masks = {"attn_mask": attn_mask, "key_padding_mask": src_key_padding_mask}
        weights, src = self._weights(run, src, pos_emb, masks)
        return self._run(run, src, weights, src_key_padding_mask, skip_rate, chunks, time_emb)

    def _run(
        self,
        run: Run,
        src: Tensor,
        weights: AttentionWeights | Tensor,
        padding: Tensor | None,
        attention_skip_rate: float = 0.0,
        chunks: dict[str, int] | None = None,
        time_emb: Tensor | None = None,
    ) -> Tensor:
        """All that comes after the attention weights, offline, in training, and on a chunk of a stream."""
        src_orig = src
        src = run.add("feed_forward1", self._timed(src, time_emb))

        mask = self.get_sequence_dropout_mask(src, attention_skip_rate)
        first_head = self._first_head(run, weights)
        src = run.add("nonlin_attention", src, first_head, balancer="balancer_na", mask=mask)
        src = run.add("self_attn1", src, weights, mask=mask)
        src = self._add_convolution(run, "conv_module1", src, time_emb, padding, chunks)
        src = run.add("feed_forward2", src, balancer="balancer_ff2", skip=self.ff2_skip_rate)

        src = run.mix("bypass_mid", src_orig, src)
        src = run.add("self_attn2", src, weights, mask=mask)
        src = self._add_convolution(run, "conv_module2", src, time_emb, padding, chunks)
        src = run.add("feed_forward3", src, balancer="balancer_ff3", skip=self.ff3_skip_rate)

        src = run.watch(src, "balancer1")
        if run.joins("norm", "bypass") and self.norm.channel_dim in (-1, 2):
            src = norm_and_bypass(self.norm, self.bypass, src_orig, src)
        else:
            src = run.mix("bypass", src_orig, run.normalise("norm", src))
        return run.watch(src, "balancer2", "whiten")

    def _weights(
        self, run: Run, src: Tensor, pos_emb: Tensor, masks: dict[str, Any]
    ) -> tuple[AttentionWeights | Tensor, Tensor]:
        """The attention weights of whole sequences, and src for all that uses it further."""
        attention = self.self_attn_weights
        if "self_attn_weights" in run.settled.fused:
            made = run.settled.backend and attention.tensor(run.settled.backend, src, pos_emb, **masks)
            return (made[0], src) if made else attention.handle(src, pos_emb, **masks, project=run.project)
        plain = "self_attn_weights" in plain_parts(self, When.ANY)
        weights = attention.handle(src, pos_emb, **masks)[0] if plain else attention(src, pos_emb=pos_emb, **masks)
        if isinstance(weights, Tensor):
            run.check(weights)
        return weights, src

    def _first_head(self, run: Run, weights: AttentionWeights | Tensor) -> AttentionWeights | Tensor:
        """The weights for NonlinAttention: those of the first head, or, drawn in training, constant ones."""
        draws = run.states is None and self.training == self.const_attention_in_training
        constant = draws and happens(self.const_attention_rate)
        return constant_attention(weights[0:1]) if constant else weights[0:1]

    def _add_convolution(
        self,
        run: Run,
        name: str,
        src: Tensor,
        time_emb: Tensor | None,
        padding: Tensor | None,
        chunks: dict[str, int] | None,
    ) -> Tensor:
        """src plus what a convolution module makes of it and of the time, if the layer has convolution modules."""
        if not self.use_conv:
            return src
        settings = {"src_key_padding_mask": padding, **(chunks or {})}
        return run.add(name, self._timed(src, time_emb), skip=self.conv_skip_rate, **settings)

    @staticmethod
    def _timed(src: Tensor, time_emb: Tensor | None) -> Tensor:
        return src if time_emb is None else src + time_emb

    def streaming_forward(
        self,
        src: Tensor,
        pos_emb: Tensor,
        cached_key: Tensor,
        cached_nonlin_attn: Tensor,
        cached_val1: Tensor,
        cached_val2: Tensor,
        cached_conv1: Tensor,
        cached_conv2: Tensor,
        left_context_len: int,
        src_key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One chunk of a stream; L is `left_context_len`.

        Args:
            src: (T, batch, embed_dim).
            pos_emb: (1 or batch, L + 2 T - 1, pos_dim).
            cached_key: (L, batch, heads * query_head_dim).
            cached_nonlin_attn: (1, batch, L, 3/4 embed_dim).
            cached_val1, cached_val2: (L, batch, heads * value_head_dim).
            cached_conv1, cached_conv2: (batch, embed_dim, cnn_module_kernel // 2).
            left_context_len: frames of left context.
            src_key_padding_mask: bools or integers (batch, L + T), True for padding and for context that does not exist
                yet.

        Returns:
            (T, batch, embed_dim), and the next six caches, in the order of the arguments.
        """
        padding = None if src_key_padding_mask is None else src_key_padding_mask[:, left_context_len:]
        left = {"left_context_len": left_context_len}
        states = {
            "nonlin_attention": State("cached_x", cached_nonlin_attn, left),
            "self_attn1": State("cached_val", cached_val1, left),
            "self_attn2": State("cached_val", cached_val2, left),
            "conv_module1": State("cache", cached_conv1, {}),
            "conv_module2": State("cache", cached_conv2, {}),
        }
        run = Run(self, src, (pos_emb, cached_key), (src_key_padding_mask,), states)
        attention, made = self.self_attn_weights, None
        key = {"cached_key": cached_key, "left_context_len": left_context_len, "key_padding_mask": src_key_padding_mask}
        if "self_attn_weights" in run.settled.fused and run.settled.backend is not None:
            made = attention.tensor(run.settled.backend, src, pos_emb, **key)
        weights, cached_key = made or attention.streaming_forward(src, pos_emb=pos_emb, **key)
        if made is None and isinstance(weights, Tensor):
            run.check(weights)
        src = self._run(run, src, weights, padding)
        following = ("nonlin_attention", "self_attn1", "self_attn2", "conv_module1", "conv_module2")
        return src, cached_key, *(states[name].value for name in following)

    def get_sequence_dropout_mask(self, x: Tensor, dropout_rate: float) -> Tensor | None:
        """Which sequences of x, (T, batch, channels), that get a branch: (batch, 1) of 0 and 1, or None for all."""
        if dropout_rate == 0.0 or not self.training:
            return None
        mask = torch.rand(x.shape[1], 1, device=x.device).gt_(dropout_rate).to(x.dtype)
        return None if all_ones(mask) else mask

    def sequence_dropout(self, x: Tensor, dropout_rate: float) -> Tensor:
        """Zeroes whole sequences of x, (T, batch, channels), at a given rate; the rest is not rescaled."""
        mask = self.get_sequence_dropout_mask(x, dropout_rate)
        return x if mask is None else x * mask
