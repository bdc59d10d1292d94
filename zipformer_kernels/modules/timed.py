"""Layers and stacks that are told a time, as ZipVoice's flow matching needs them.

They are the encoder's own, but that an embedding of the time is added to what goes into the feed-forward and the
convolutions, that there are no chunks and no streams, and that a layer may do without convolutions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zipformer_kernels.modules.layer import ZipformerEncoderLayer
from zipformer_kernels.modules.stack import DownsampledZipformerEncoder, ZipformerEncoder
from zipformer_kernels.modules.swoosh import SwooshR
from zipformer_kernels.ops.attention import downsample_mask


class TimedEncoderLayer(ZipformerEncoderLayer):
    """A layer that takes an embedding of the time.

    Args:
        *args, **kwargs: as `ZipformerEncoderLayer` has them, without `causal`.
        use_conv: whether the layer has its two convolution modules.
    """

    def __init__(self, *args: Any, use_conv: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.bypass_scale
        self.use_conv = use_conv
        if not use_conv:
            del self.conv_module1, self.conv_module2

    def forward(
        self,
        src: Tensor,
        pos_emb: Tensor,
        time_emb: Tensor | None = None,
        attn_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """From (T, batch, embed_dim) to the same shape.

        Args:
            src: (T, batch, embed_dim).
            pos_emb: (1 or batch, 2 T - 1, pos_dim).
            time_emb: (batch, embed_dim) or (T, batch, embed_dim), added before the first feed-forward and before each
                convolution module; or None.
            attn_mask: bool (T, T) or (batch, T, T), True where target (row) may not attend to source (column).
            src_key_padding_mask: bools or integers (batch, T), True for padding.
        """
        return self._run_offline(src, pos_emb, attn_mask, src_key_padding_mask, {}, time_emb)


class TimedEncoder(ZipformerEncoder):
    """A stack of `TimedEncoderLayer`.

    Args:
        encoder_layer, num_layers, pos_dim, warmup_begin, warmup_end, initial_layerdrop_rate, final_layerdrop_rate: as
            `ZipformerEncoder` has them.
        embed_dim: channels of the layers.
        time_embed_dim: channels of the time's embedding; -1 for a stack that takes none.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        embed_dim: int,
        time_embed_dim: int,
        pos_dim: int,
        warmup_begin: float,
        warmup_end: float,
        initial_layerdrop_rate: float = 0.5,
        final_layerdrop_rate: float = 0.05,
    ) -> None:
        rates = initial_layerdrop_rate, final_layerdrop_rate
        super().__init__(encoder_layer, num_layers, pos_dim, 0.0, warmup_begin, warmup_end, *rates)
        timed = time_embed_dim != -1
        self.time_emb = nn.Sequential(SwooshR(), nn.Linear(time_embed_dim, embed_dim)) if timed else None

    def forward(
        self,
        src: Tensor,
        time_emb: Tensor | None = None,
        attn_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """From (T, batch, channels) to the same shape.

        Args:
            src: (T, batch, channels).
            time_emb: (batch, time_embed_dim) or (T, batch, time_embed_dim).
            attn_mask, src_key_padding_mask: as `TimedEncoderLayer.forward` has them.

        Raises:
            ValueError: there is a `time_emb` and the stack takes none, or the other way round.
        """
        if (self.time_emb is None) != (time_emb is None):
            raise ValueError(f"time_emb: {'got one, but this stack takes none' if time_emb is not None else 'missing'}")
        pos_emb = self.encoder_pos(src)
        if time_emb is not None:
            time_emb = self.time_emb(time_emb)
        for layer in self.layers:
            src = layer(src, pos_emb, time_emb=time_emb, attn_mask=attn_mask, src_key_padding_mask=src_key_padding_mask)
        return src


class TimedDownsampledEncoder(DownsampledZipformerEncoder):
    """A `TimedEncoder` at a lower frame rate, with a bypass around it.

    Args:
        encoder: the stack.
        dim: channels.
        downsample: how many frames become one.
    """

    def __init__(self, encoder: nn.Module, dim: int, downsample: int) -> None:
        super().__init__(encoder, dim, downsample, dropout=0.0, causal=False)

    def forward(
        self,
        src: Tensor,
        time_emb: Tensor | None = None,
        attn_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """As `TimedEncoder.forward`; all arguments are at the full frame rate."""
        ds = self.downsample_factor
        output = self.encoder(
            self.downsample(src),
            time_emb=time_emb[::ds] if time_emb is not None and time_emb.dim() == 3 else time_emb,
            attn_mask=downsample_mask(attn_mask, ds),
            src_key_padding_mask=None if src_key_padding_mask is None else src_key_padding_mask[..., ::ds],
        )
        return self._combine(src, output)
