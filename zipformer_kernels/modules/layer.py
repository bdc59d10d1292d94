"""One layer: attention weights that three modules share, feed-forwards, convolutions and bypasses."""

from __future__ import annotations

import copy
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_kernels.branch.plain import NONE, Way, made_of, plain_module, plain_parts
from zipformer_kernels.core.launch import few_rows
from zipformer_kernels.modules.attention import RelPositionMultiheadAttentionWeights, SelfAttention, given_mask
from zipformer_kernels.modules.bias_norm import BiasNorm
from zipformer_kernels.modules.bypass import BypassModule
from zipformer_kernels.modules.convolution import ConvolutionModule
from zipformer_kernels.modules.feedforward import FeedforwardModule
from zipformer_kernels.modules.inference import only_computes
from zipformer_kernels.modules.module import Module
from zipformer_kernels.modules.nonlin_attention import NonlinAttention
from zipformer_kernels.ops.attention import AttentionWeights, ChunkMask, constant_attention
from zipformer_kernels.training import Balancer, FloatLike, ScheduledFloat, Whiten, whitening_schedule
from zipformer_kernels.training.randomness import happens, keeps_all, number

DYNAMIC_SKIP_RATE = ScheduledFloat((0.0, 0.2), (4000.0, 0.05), (16000, 0.0), default=0)
CONST_ATTENTION_RATE = ScheduledFloat((0.0, 0.25), (4000.0, 0.025), default=0)
FEEDFORWARD_SKIP_RATE = ScheduledFloat((0.0, 0.1), (4000.0, 0.01), (50000.0, 0.0))
BYPASS_SKIP_RATE = ScheduledFloat((0.0, 0.5), (4000.0, 0.02), default=0)


@made_of(
    {
        "balancer1": Balancer,
        "balancer2": Balancer,
        "balancer_na": Balancer,
        "balancer_ff2": Balancer,
        "balancer_ff3": Balancer,
        "whiten": Whiten,
    },
    bypass=BypassModule,
    bypass_mid=BypassModule,
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
        return self._run(src, pos_emb, chunk_size, attn_mask, src_key_padding_mask)

    def _run(
        self,
        src: Tensor,
        pos_emb: Tensor,
        chunk_size: int | None,
        attn_mask: Tensor | ChunkMask | None,
        src_key_padding_mask: Tensor | None,
        time_emb: Tensor | None = None,
    ) -> Tensor:
        """`forward`, and that of `TimedEncoderLayer`, where there are no chunks but an embedding of the time."""
        attn_mask = given_mask(attn_mask, src, self.self_attn_weights, RelPositionMultiheadAttentionWeights)
        fused = plain_parts(self, Way.INFERENCE) if not self.training and only_computes(src) else NONE
        src_orig = src
        # A rate is read before its module runs, so that numbers are drawn in upstream's order.
        attention_skip_rate = self._rate(self.attention_skip_rate)
        attention = self.self_attn_weights
        plain = plain_module(attention, RelPositionMultiheadAttentionWeights)
        weights = (attention.handle if plain else attention)(
            src, pos_emb=pos_emb, attn_mask=attn_mask, key_padding_mask=src_key_padding_mask
        )
        src = src if time_emb is None else src + time_emb
        src = self._add(src, "feed_forward1", fused=fused, over=False)

        mask = self.get_sequence_dropout_mask(src, attention_skip_rate)
        first_head = self._given_to("nonlin_attention", self._first_head(weights))
        src = self._add(src, "nonlin_attention", first_head, fused=fused, balancer="balancer_na", mask=mask)
        src = self._add(src, "self_attn1", self._given_to("self_attn1", weights), fused=fused, mask=mask)
        src = self._add_convolution(src, "conv_module1", fused, time_emb, chunk_size, src_key_padding_mask)
        skip_rate = self._rate(self.ff2_skip_rate)
        src = self._add(src, "feed_forward2", fused=fused, balancer="balancer_ff2", skip_rate=skip_rate)

        over = "bypass_mid" in fused  # else who has seen its result may keep it
        src = self.bypass_mid.write_over(src_orig, src) if over else self.bypass_mid(src_orig, src)
        src = self._add(src, "self_attn2", self._given_to("self_attn2", weights), fused=fused, over=over, mask=mask)
        src = self._add_convolution(src, "conv_module2", fused, time_emb, chunk_size, src_key_padding_mask)
        skip_rate = self._rate(self.ff3_skip_rate)
        src = self._add(src, "feed_forward3", fused=fused, balancer="balancer_ff3", skip_rate=skip_rate)
        src = self._bypass(src_orig, self._watch(src, "balancer1", fused), fused)
        return self._watch(self._watch(src, "balancer2", fused), "whiten", fused)

    def _first_head(self, weights: AttentionWeights | Tensor) -> AttentionWeights | Tensor:
        """The weights for NonlinAttention: those of the first head, or, drawn in training, constant ones."""
        constant = self.training == self.const_attention_in_training and happens(self.const_attention_rate)
        return constant_attention(weights[0:1]) if constant else weights[0:1]

    def _add_convolution(
        self,
        src: Tensor,
        name: str,
        fused: Set[str],
        time_emb: Tensor | None,
        chunk_size: int | None,
        padding: Tensor | None,
    ) -> Tensor:
        """src plus what a convolution module makes of it and of the time, if the layer has convolution modules."""
        if not self.use_conv:
            return src
        skip_rate = self._rate(self.conv_skip_rate)
        src = src if time_emb is None else src + time_emb
        chunks = {} if chunk_size is None else {"chunk_size": chunk_size}
        return self._add(src, name, fused=fused, skip_rate=skip_rate, src_key_padding_mask=padding, **chunks)

    def _add(
        self,
        src: Tensor,
        name: str,
        *args: Any,
        fused: Set[str],
        over: bool = True,
        balancer: str | None = None,
        mask: Tensor | None = None,
        skip_rate: float = 0.0,
        **kwargs: Any,
    ) -> Tensor:
        """src plus what a module makes of it, in a new tensor or in the place of src.

        Args:
            src: (T, batch, embed_dim).
            name: the module's.
            *args, **kwargs: its other arguments.
            fused: the names of the parts whose calls may be left out.
            over: whether src may be overwritten then.
            balancer: the name of the balancer of its result.
            mask, skip_rate: which sequences it is added to, (batch, 1); or how often one is not.
        """
        module = getattr(self, name)
        if name in fused and (balancer is None or balancer in fused):
            return module.add_to(src, *args, over=over, **kwargs)
        branch = module(src, *args, **kwargs)
        if balancer is not None:
            branch = getattr(self, balancer)(branch)
        if skip_rate != 0.0:
            mask = self.get_sequence_dropout_mask(branch, skip_rate)
        return src + branch if mask is None else torch.addcmul(src, branch, mask)

    def _add_chunk(self, src: Tensor, name: str, *args: Any, fused: Set[str], **kwargs: Any) -> tuple[Tensor, Tensor]:
        """src plus what a module makes of it and of its left context, and the next left context; else as `_add`."""
        module = getattr(self, name)
        if name in fused:
            return module.add_chunk_to(src, *args, **kwargs)
        branch, cache = module.streaming_forward(src, *args, **kwargs)
        return src + branch, cache

    def _watch(self, src: Tensor, name: str, fused: Set[str]) -> Tensor:
        """src behind a module that changes nothing but gradients."""
        return src if name in fused else getattr(self, name)(src)

    def _bypass(self, src_orig: Tensor, src: Tensor, fused: Set[str]) -> Tensor:
        """The norm and the bypass around the layer."""
        src = self.norm(src)
        if "norm" in fused and "bypass" in fused:
            return self.bypass.write_over(src_orig, src)
        return self.bypass(src_orig, src)

    def _given_to(self, name: str, weights: AttentionWeights | Tensor) -> AttentionWeights | Tensor:
        """The weights as a module takes them: classes and functions in the place of ours want a tensor."""
        module = getattr(self, name)
        takes_handles = type(module) in (SelfAttention, NonlinAttention) and "forward" not in module.__dict__
        return weights if takes_handles or isinstance(weights, Tensor) else weights.materialize()

    def _rate(self, schedule: FloatLike) -> float:
        return number(schedule) if self.training else 0.0

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
        src_orig = src
        padding = None if src_key_padding_mask is None else src_key_padding_mask[:, left_context_len:]
        weights, cached_key = self.self_attn_weights.streaming_forward(
            src,
            pos_emb=pos_emb,
            cached_key=cached_key,
            left_context_len=left_context_len,
            key_padding_mask=src_key_padding_mask,
        )
        fused = plain_parts(self, Way.CHUNK) if only_computes(src) else NONE
        if fused and few_rows(src):  # every use would ask for the tensor
            weights = weights.materialize() if isinstance(weights, AttentionWeights) else weights
        length = {"left_context_len": left_context_len}
        src = self._add(src, "feed_forward1", fused=fused, over=False)
        given = self._given_to("nonlin_attention", weights[0:1])
        src, cached_nonlin_attn = self._add_chunk(
            src, "nonlin_attention", given, cached_x=cached_nonlin_attn, fused=fused, **length
        )
        given = self._given_to("self_attn1", weights)
        src, cached_val1 = self._add_chunk(
            src, "self_attn1", attn_weights=given, cached_val=cached_val1, fused=fused, **length
        )
        src, cached_conv1 = self._add_chunk(
            src, "conv_module1", cache=cached_conv1, src_key_padding_mask=padding, fused=fused
        )
        src = self._add(src, "feed_forward2", fused=fused)
        over = "bypass_mid" in fused  # else who has seen its result may keep it
        src = self.bypass_mid.write_over(src_orig, src) if over else self.bypass_mid(src_orig, src)
        given = self._given_to("self_attn2", weights)
        src, cached_val2 = self._add_chunk(
            src, "self_attn2", attn_weights=given, cached_val=cached_val2, fused=fused, **length
        )
        src, cached_conv2 = self._add_chunk(
            src, "conv_module2", cache=cached_conv2, src_key_padding_mask=padding, fused=fused
        )
        src = self._add(src, "feed_forward3", fused=fused)
        src = self._bypass(src_orig, src, fused)
        return src, cached_key, cached_nonlin_attn, cached_val1, cached_val2, cached_conv1, cached_conv2

    def get_sequence_dropout_mask(self, x: Tensor, dropout_rate: float) -> Tensor | None:
        """Which sequences of x, (T, batch, channels), to keep: (batch, 1) of 0 and 1, or None to keep all."""
        if dropout_rate == 0.0 or not self.training:
            return None
        mask = (torch.rand(x.shape[1], 1, device=x.device) > dropout_rate).to(x.dtype)
        return None if keeps_all(mask) else mask

    def sequence_dropout(self, x: Tensor, dropout_rate: float) -> Tensor:
        """Zeroes whole sequences of x, (T, batch, channels), at a given rate; the rest is not rescaled."""
        mask = self.get_sequence_dropout_mask(x, dropout_rate)
        return x if mask is None else x * mask
