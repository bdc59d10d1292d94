"""Stacks of layers, at the full frame rate and at a lower one."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipformer_kernels.branch.plain import When, made_of, matches, plain_parts, takes
from zipformer_kernels.branch.ways import IN_PLACE, settle
from zipformer_kernels.core.call import autocast_dtype, being_traced
from zipformer_kernels.core.module import Module
from zipformer_kernels.core.private import dispatch_modes
from zipformer_kernels.modules.attention import given_mask
from zipformer_kernels.modules.bypass import BypassModule
from zipformer_kernels.modules.layer import ZipformerEncoderLayer
from zipformer_kernels.modules.positional import CompactRelPositionalEncoding
from zipformer_kernels.modules.resample import SimpleDownsample, SimpleUpsample
from zipformer_kernels.ops.attention import ChunkMask, downsample_mask
from zipformer_kernels.ops.downsample import downsample
from zipformer_kernels.ops.sizes import first
from zipformer_kernels.ops.upsample_bypass import has_kernels, upsample_bypass
from zipformer_kernels.training import FloatLike, ScheduledFloat
from zipformer_kernels.training.randomness import all_ones

STATES_PER_LAYER = 6

AROUND = frozenset({"upsample", "out_combiner"})
"""What stands behind a stack at a lower rate."""


@made_of()
class ZipformerEncoder(Module):
    """A stack of layers of the same shape, all starting as copies of one.

    Args:
        encoder_layer: the layer to copy.
        num_layers: how many.
        pos_dim: channels of the positional encoding.
        dropout: accepted as upstream has it; it changes nothing.
        warmup_begin, warmup_end: batches between which the layers, one after the other, go from
            `initial_layerdrop_rate` to `final_layerdrop_rate`.
        initial_layerdrop_rate, final_layerdrop_rate: the probability, in training, that a sequence skips a
            layer.

    Raises:
        ValueError: not 0 <= warmup_begin <= warmup_end.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        pos_dim: int,
        dropout: FloatLike,
        warmup_begin: float,
        warmup_end: float,
        initial_layerdrop_rate: float = 0.5,
        final_layerdrop_rate: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_begin <= warmup_end:
            raise ValueError(f"wanted 0 <= warmup_begin <= warmup_end, got {warmup_begin} and {warmup_end}")
        self.encoder_pos = CompactRelPositionalEncoding(pos_dim, dropout_rate=0.15, length_factor=1.0)
        self.layers = nn.ModuleList([_copy(encoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers

        delta = (1.0 / num_layers) * (warmup_end - warmup_begin)
        begin = warmup_begin
        for layer in self.layers:
            end = begin + delta
            layer.bypass.skip_rate = ScheduledFloat(
                (begin, initial_layerdrop_rate), (end, final_layerdrop_rate), default=0.0
            )
            begin = end

    def forward(
        self,
        src: Tensor,
        chunk_size: int = -1,
        feature_mask: Tensor | float = 1.0,
        attn_mask: Tensor | ChunkMask | None = None,
        src_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Offline or chunk-causal.

        Args:
            src: (T, batch, channels).
            chunk_size: frames per chunk of the convolutions; -1 for no chunks.
            feature_mask: multiplies src and every layer's result; broadcasts with (T, batch, channels).
            attn_mask: bool (T, T) or (batch, T, T), True where target (row) may not attend to source
                (column).
            src_key_padding_mask: bools or integers (batch, T), True for padding.

        Returns:
            (T, batch, channels).
        """
        mask = mask_of(feature_mask)
        src = src if mask is None else src * mask
        src = self.run_layers(src, mask, chunk_size, attn_mask, src_key_padding_mask)
        return src if mask is None else src * mask

    def run_layers(
        self,
        src: Tensor,
        mask: Tensor | float | None,
        chunk_size: int,
        attn_mask: Tensor | ChunkMask | None,
        src_key_padding_mask: Tensor | None,
    ) -> Tensor:
        """`forward` on what the feature mask has multiplied already, less its product with the last layer's result."""
        pos_emb = self._positions(src)
        for i, layer in enumerate(self.layers):
            if i > 0 and mask is not None:
                src = src * mask
            src = layer(
                src,
                pos_emb,
                chunk_size=chunk_size,
                attn_mask=given_mask(attn_mask, src, layer, ZipformerEncoderLayer),
                src_key_padding_mask=src_key_padding_mask,
            )
        return src

    def _positions(self, src: Tensor) -> Tensor:
        """The positional encoding, under autocast in the dtype that all layers would cast it to, each for itself."""
        pos_emb, dtype = self.encoder_pos(src), autocast_dtype(src)
        if dtype is None or being_traced() or not all(map(_only_projects_positions, self.layers)):
            return pos_emb
        return pos_emb.to(dtype)

    def streaming_forward(
        self,
        src: Tensor,
        states: list[Tensor],
        left_context_len: int,
        src_key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One chunk of a stream.

        Args:
            src: (T, batch, channels).
            states: six caches for each layer, see `ZipformerEncoderLayer.streaming_forward`.
            left_context_len: frames of left context L.
            src_key_padding_mask: bools or integers (batch, L + T), True for padding and for context that does not exist
                yet.

        Returns:
            (T, batch, channels), and the next `states`.

        Raises:
            ValueError: `states` has not six tensors for each layer.
        """
        if len(states) != STATES_PER_LAYER * self.num_layers:
            wanted = STATES_PER_LAYER * self.num_layers
            raise ValueError(f"states: wanted {wanted} tensors for {self.num_layers} layers, got {len(states)}")
        pos_emb = self.encoder_pos(src, left_context_len)
        new_states: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            src, *layer_states = layer.streaming_forward(
                src,
                pos_emb,
                *states[i * STATES_PER_LAYER : (i + 1) * STATES_PER_LAYER],
                left_context_len=left_context_len,
                src_key_padding_mask=src_key_padding_mask,
            )
            new_states += layer_states
        return src, new_states


@made_of(upsample=SimpleUpsample, out_combiner=BypassModule)
class DownsampledZipformerEncoder(Module):
    """A stack that runs at a lower frame rate, between downsampling and upsampling, with a bypass around it.

    Args:
        encoder: the stack.
        dim: channels.
        downsample: how many frames become one.
        dropout, causal: passed to `SimpleDownsample`.
    """

    def __init__(self, encoder: nn.Module, dim: int, downsample: int, dropout: FloatLike, causal: bool) -> None:
        super().__init__()
        self.downsample_factor = downsample
        self.downsample = SimpleDownsample(dim, downsample, dropout, causal)
        self.num_layers = encoder.num_layers
        self.encoder = encoder
        self.upsample = SimpleUpsample(dim, downsample)
        self.out_combiner = BypassModule(dim, straight_through_rate=0)

    def forward(
        self,
        src: Tensor,
        chunk_size: int = -1,
        feature_mask: Tensor | float = 1.0,
        attn_mask: Tensor | ChunkMask | None = None,
        src_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """As `ZipformerEncoder.forward`; T, `chunk_size` and `attn_mask` are at the full frame rate.

        `feature_mask` broadcasts over time and `src_key_padding_mask` is already at the lower rate.
        """
        ds, chunk_size = self.downsample_factor, chunk_size // self.downsample_factor  # -1 stays -1
        attn_mask = downsample_mask(attn_mask, ds)
        if self._is_plain() and has_kernels(src):
            channels, mask = len(self.out_combiner.bypass_scale), mask_of(feature_mask)
            if mask is None or _drops_channels(mask, src):
                mask = None if mask is None else mask.expand(1, src.shape[1], channels)[0]
                output = downsample(src, self.downsample.bias, mask, channels)
                output = self.encoder.run_layers(output, mask, chunk_size, attn_mask, src_key_padding_mask)
                return self._combine(src, output, mask)
            src = F.pad(src, (0, channels - src.shape[2])) if src.shape[2] < channels else src
        output = self.downsample(src)
        output = self.encoder(
            output,
            chunk_size=chunk_size,
            feature_mask=feature_mask,
            attn_mask=given_mask(attn_mask, output, self.encoder, ZipformerEncoder),
            src_key_padding_mask=src_key_padding_mask,
        )
        return self._combine(src, output)

    def streaming_forward(
        self,
        src: Tensor,
        states: list[Tensor],
        left_context_len: int,
        src_key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `ZipformerEncoder.streaming_forward`; only src and the result are at the full frame rate."""
        output, states = self.encoder.streaming_forward(
            self.downsample(src),
            states=states,
            left_context_len=left_context_len,
            src_key_padding_mask=src_key_padding_mask,
        )
        return self._combine(src, output), states

    def takes_fewer_channels(self, x: Tensor) -> bool:
        """Whether x may come without channels that are zero, in a call that nobody sees."""
        return matches(self, DownsampledZipformerEncoder, When.ANY) and self._is_plain() and has_kernels(x)

    def _is_plain(self) -> bool:
        """Whether nobody sees the calls of its parts, but of what those of the encoder are."""
        matching = (self.downsample, SimpleDownsample), (self.encoder, ZipformerEncoder)
        return plain_parts(self, When.ANY) >= AROUND and all(matches(*pair, When.ANY) for pair in matching)

    def _combine(self, src: Tensor, output: Tensor, mask: Tensor | None = None) -> Tensor:
        """The bypass from src to the masked output, repeated."""
        settled = settle(self, src, (output,), When.INFERENCE)
        if mask is None and IN_PLACE in settled.ways and settled.fused == AROUND:
            scale, factor = self.out_combiner.bypass_scale, self.upsample.upsample
            fits = output.shape == (-(-src.shape[0] // factor), *src.shape[1:])
            if fits and scale.shape == src.shape[-1:]:
                return _bypass_repeated(src, output, scale, factor)
        if plain_parts(self, When.ANY) >= AROUND and has_kernels(src):
            scale = self.out_combiner.drawn_scale(src.shape[1])
            return upsample_bypass(src, output, scale, self.upsample.upsample, mask)
        return self.out_combiner(src, first(self.upsample(output), src.shape[0], dim=0))


def _only_projects_positions(layer: nn.Module) -> bool:
    """Whether nobody sees the positional encoding that a layer is given, but the projection of positions."""
    if not takes(layer, ZipformerEncoderLayer):
        return False
    looked_at = layer._forward_hooks or layer._forward_pre_hooks
    return not looked_at and "self_attn_weights" in plain_parts(layer, When.ANY)


def mask_of(feature_mask: Tensor | float) -> Tensor | float | None:
    """The mask, or None where it is known to be 1 everywhere."""
    ones = all_ones(feature_mask) if isinstance(feature_mask, Tensor) else feature_mask == 1.0
    return None if ones else feature_mask


def _drops_channels(mask: Tensor | float, x: Tensor) -> bool:
    """Whether kernels can multiply x by a mask: the same for all frames, of no wider dtype, without a gradient."""
    if not isinstance(mask, Tensor) or mask.requires_grad or (mask.ndim > 2 and mask.shape[0] != 1):
        return False
    return torch.promote_types(mask.dtype, x.dtype) == x.dtype


def _bypass_repeated(src: Tensor, output: Tensor, scale: Tensor, factor: int) -> Tensor:
    """src + (every frame of the output repeated - src) * scale in one pass."""
    whole = src.shape[0] // factor
    split = whole * factor
    result = torch.empty_like(src)
    groups = (x[:split].unflatten(0, (whole, factor)) for x in (src, result))
    torch.lerp(next(groups), output[:whole].unsqueeze(1), scale, out=next(groups))
    if split < src.shape[0]:
        torch.lerp(src[split:], output[whole], scale, out=result[split:])
    return result


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy, but for the modes that it is made under: fake tensors hold theirs, and a copied one is another."""
    return copy.deepcopy(module, {id(mode): mode for mode in dispatch_modes()})
