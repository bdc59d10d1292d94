"""The Zipformer encoder: stacks of layers at several frame rates, a U-Net in time."""

from __future__ import annotations

import contextlib
import random
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_kernels.core.module import Module
from zipformer_kernels.modules.attention import given_mask
from zipformer_kernels.modules.layer import ZipformerEncoderLayer
from zipformer_kernels.modules.resample import SimpleDownsample
from zipformer_kernels.modules.stack import STATES_PER_LAYER, DownsampledZipformerEncoder, ZipformerEncoder
from zipformer_kernels.ops.attention import ChunkMask
from zipformer_kernels.ops.shapes import as_mask, check_lengths
from zipformer_kernels.ops.sizes import compact, of_every_size
from zipformer_kernels.presets import CAUSAL, preset
from zipformer_kernels.training import FloatLike, ScheduledFloat
from zipformer_kernels.training.randomness import being_traced

FEATURE_MASK_DROPOUT = 0.125


class Zipformer(Module):
    """The encoder of the Zipformer paper, arXiv:2310.11230; arguments, names and checkpoints are upstream's.

    In an icefall recipe it passes for an ``EncoderInterface``, see `join_interface`.

    Arguments that upstream documents as "int or tuple" take one number for all stacks or a tuple with one for
    each; the length of `downsampling_factor` is the number of stacks. All frames are counted at the rate of
    x.

    Args:
        output_downsampling_factor: how many frames become one at the output.
        downsampling_factor: how many frames become one inside each stack.
        encoder_dim: channels of each stack.
        num_encoder_layers: layers of each stack.
        encoder_unmasked_dim: channels of each stack that feature masks, a dropout in training, leave alone.
        query_head_dim, pos_head_dim, value_head_dim: channels per head of queries and keys, of positional
            queries, and of values.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the feed-forward modules.
        cnn_module_kernel: odd width of the depthwise convolutions.
        pos_dim: channels of the positional encoding.
        dropout: dropout rate; by default from 0.3 to 0.1 over 20000 batches.
        warmup_batches: over how many batches the rates at which layers are skipped go down, stack after
            stack.
        causal: use chunk-causal convolutions, for streaming.
        chunk_size: frames per chunk; one is picked at random on every call. -1 for no chunks.
        left_context_frames: frames before its chunk that a frame may attend to, rounded down to chunks but to
            no fewer than one; picked at random likewise. -1 for all.

    Raises:
        ValueError: a tuple has the wrong length, a number is zero or less, or an `encoder_unmasked_dim` exceeds its
            `encoder_dim`.
    """

    downsamples_output = True  # `forward` of icefall's SSL recipe does not: its output is at the rate of x

    def __init__(
        self,
        output_downsampling_factor: int = 2,
        downsampling_factor: tuple[int, ...] = (2, 4),
        encoder_dim: int | tuple[int, ...] = 384,
        num_encoder_layers: int | tuple[int, ...] = 4,
        encoder_unmasked_dim: int | tuple[int, ...] = 256,
        query_head_dim: int | tuple[int, ...] = 24,
        pos_head_dim: int | tuple[int, ...] = 4,
        value_head_dim: int | tuple[int, ...] = 12,
        num_heads: int | tuple[int, ...] = 8,
        feedforward_dim: int | tuple[int, ...] = 1536,
        cnn_module_kernel: int | tuple[int, ...] = 31,
        pos_dim: int = 192,
        dropout: FloatLike | None = None,
        warmup_batches: float = 4000.0,
        causal: bool = False,
        chunk_size: tuple[int, ...] = (-1,),
        left_context_frames: tuple[int, ...] = (-1,),
    ) -> None:
        join_interface(self)
        super().__init__()
        if dropout is None:
            dropout = ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
        num_stacks = len(downsampling_factor)

        def per_stack(name: str, value: int | tuple[int, ...], least: int = 1) -> tuple[int, ...]:
            values = (value,) if isinstance(value, (Integral, float)) else tuple(value)
            if not all(isinstance(one, Integral) and one >= least for one in values):
                raise ValueError(f"{name}: wanted whole numbers of at least {least}, got {value!r}")
            values = values * num_stacks if len(values) == 1 else values
            if len(values) != num_stacks:
                raise ValueError(f"{name}: wanted one number or {num_stacks}, one per stack, got {value}")
            return values

        if num_stacks == 0:
            raise ValueError("downsampling_factor: wanted one number for each stack, got none")
        per_stack("downsampling_factor", downsampling_factor)
        self.output_downsampling_factor = output_downsampling_factor
        self.downsampling_factor = downsampling_factor
        self.encoder_dim = per_stack("encoder_dim", encoder_dim)
        self.encoder_unmasked_dim = per_stack("encoder_unmasked_dim", encoder_unmasked_dim, least=0)
        self.num_encoder_layers = per_stack("num_encoder_layers", num_encoder_layers)
        self.query_head_dim = per_stack("query_head_dim", query_head_dim)
        self.value_head_dim = per_stack("value_head_dim", value_head_dim)
        self.num_heads = per_stack("num_heads", num_heads)
        self.cnn_module_kernel = per_stack("cnn_module_kernel", cnn_module_kernel)
        pos_head_dim = per_stack("pos_head_dim", pos_head_dim)
        feedforward_dim = per_stack("feedforward_dim", feedforward_dim)
        self.causal = causal
        self.chunk_size = chunk_size
        self.left_context_frames = left_context_frames
        for unmasked, channels in zip(self.encoder_unmasked_dim, self.encoder_dim, strict=True):
            if unmasked > channels:
                raise ValueError(f"encoder_unmasked_dim: {unmasked} exceeds the stack's encoder_dim {channels}")

        stacks: list[nn.Module] = []
        for i, ds in enumerate(downsampling_factor):
            layer = ZipformerEncoderLayer(
                embed_dim=self.encoder_dim[i],
                pos_dim=pos_dim,
                num_heads=self.num_heads[i],
                query_head_dim=self.query_head_dim[i],
                pos_head_dim=pos_head_dim[i],
                value_head_dim=self.value_head_dim[i],
                feedforward_dim=feedforward_dim[i],
                dropout=dropout,
                cnn_module_kernel=self.cnn_module_kernel[i],
                causal=causal,
            )
            # The first share of the warm-up is left to the conv embed, which comes before the encoder.
            stack = ZipformerEncoder(
                layer,
                self.num_encoder_layers[i],
                pos_dim=pos_dim,
                dropout=dropout,
                warmup_begin=warmup_batches * (i + 1) / (num_stacks + 1),
                warmup_end=warmup_batches * (i + 2) / (num_stacks + 1),
                final_layerdrop_rate=0.035 * (ds**0.5),
            )
            if ds != 1:
                stack = DownsampledZipformerEncoder(
                    stack, dim=self.encoder_dim[i], downsample=ds, dropout=dropout, causal=causal
                )
            stacks.append(stack)
        self.encoders = nn.ModuleList(stacks)
        self.downsample_output = SimpleDownsample(
            max(self.encoder_dim), downsample=output_downsampling_factor, dropout=dropout, causal=causal
        )

    @classmethod
    def from_preset(cls, name: str, causal: bool = False, **overrides: Any) -> Zipformer:
        """An encoder of a published size, with fresh weights.

        Args:
            name: "S", "M", "L" or "XL".
            causal: for streaming, with the recipe's chunk sizes and left contexts.
            **overrides: other arguments of `Zipformer`, in place of the preset's.

        Raises:
            ValueError: there is no such preset.
        """
        return cls(**{**preset(name), "causal": causal, **(CAUSAL if causal else {}), **overrides})

    @of_every_size
    def forward(self, x: Tensor, x_lens: Tensor, src_key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encodes whole sequences; a causal model sees them in chunks.

        Args:
            x: (T, batch, encoder_dim[0]), T at least 1. Fewer or more channels are padded with zeros or
                cropped.
            x_lens: (batch,), the frames of each sequence before padding.
            src_key_padding_mask: (batch, T), bools, or integers other than 0, for padding.

        Returns:
            Embeddings (ceil(T / output_downsampling_factor), batch, max(encoder_dim)), and their lengths
            (batch,).

        Raises:
            ValueError: a shape does not fit, or the chunk size picked fits the downsampling or the kernels
                badly.
            TypeError: src_key_padding_mask is neither of bools nor of integers, or x_lens no tensor.
        """
        self._check_input(x, x_lens)
        src_key_padding_mask = _checked_padding(src_key_padding_mask, x.shape[1], x.shape[0])
        x = compact(x)  # sums keep strides, and products would copy rows that lie batch-major, each anew
        feature_masks = self.get_feature_masks(x)
        chunk_size, left_context_chunks = self.get_chunk_info()
        attn_mask = self._get_attn_mask(chunk_size, left_context_chunks)

        pieces = []
        for i, stack in enumerate(self.encoders):
            x = stack(
                self._fitted(x, i),
                chunk_size=chunk_size,
                feature_mask=feature_masks[i],
                src_key_padding_mask=_every(src_key_padding_mask, self.downsampling_factor[i]),
                attn_mask=given_mask(attn_mask, x, stack, ZipformerEncoder, DownsampledZipformerEncoder),
            )
            x, piece = self._handed_on(x, i)
            pieces.append(piece)
        if not self.downsamples_output:
            return _joined(pieces), x_lens
        return self._finish(pieces, x_lens)

    @of_every_size
    def streaming_forward(
        self, x: Tensor, x_lens: Tensor, states: list[Tensor], src_key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encodes one chunk of a batch of streams. L is ``left_context_frames[0]``.

        Args:
            x: (T, batch, encoder_dim[0]), T a multiple of every downsampling factor.
            x_lens: (batch,), the frames of each sequence before padding.
            states: six tensors for each layer, from `get_init_states` or the last chunk.
            src_key_padding_mask: (batch, L + T), bools, or integers other than 0, for padding and for left context
                that does not exist yet.

        Returns:
            Embeddings and their lengths as from `forward`, and the next `states`.

        Raises:
            ValueError: a shape or the number of states does not fit.
            TypeError: src_key_padding_mask is neither of bools nor of integers, or x_lens no tensor.
        """
        self._check_input(x, x_lens)
        left_context = self.left_context_frames[0]
        src_key_padding_mask = _checked_padding(src_key_padding_mask, x.shape[1], left_context + x.shape[0])
        wanted = STATES_PER_LAYER * sum(stack.num_layers for stack in self.encoders)
        if len(states) != wanted:
            raise ValueError(f"states: wanted {wanted} tensors, {STATES_PER_LAYER} for each layer, got {len(states)}")
        pieces, new_states = [], []
        offset = 0
        for i, stack in enumerate(self.encoders):
            ds = self.downsampling_factor[i]
            num_states = STATES_PER_LAYER * stack.num_layers
            x, stack_states = stack.streaming_forward(
                convert_num_channels(x, self.encoder_dim[i]),
                states=states[offset : offset + num_states],
                left_context_len=left_context // ds,
                src_key_padding_mask=_every(src_key_padding_mask, ds),
            )
            offset += num_states
            x, piece = self._handed_on(x, i)
            pieces.append(piece)
            new_states += stack_states
        return *self._finish(pieces, x_lens), new_states

    def get_init_states(self, batch_size: int = 1, device: torch.device | str = "cpu") -> list[Tensor]:
        """The states before the first chunk: zeros, in the dtype of the parameters.

        For each layer, with L frames of left context at the layer's rate: cached_key (L, batch, keys),
        cached_nonlin_attn (1, batch, L, hidden), cached_val1 and cached_val2 (L, batch, values), cached_conv1
        and cached_conv2 (batch, channels, cnn_module_kernel // 2).

        Raises:
            ValueError: the model has no limited left context.
        """
        if self.left_context_frames[0] < 0:
            raise ValueError(f"left_context_frames: streaming needs the first limited, got {self.left_context_frames}")
        dtype = self.downsample_output.bias.dtype
        states = []
        for i, stack in enumerate(self.encoders):
            left = self.left_context_frames[0] // self.downsampling_factor[i]
            channels, heads = self.encoder_dim[i], self.num_heads[i]
            value = (left, batch_size, heads * self.value_head_dim[i])
            conv = (batch_size, channels, self.cnn_module_kernel[i] // 2)
            shapes = [
                (left, batch_size, heads * self.query_head_dim[i]),
                (1, batch_size, left, 3 * channels // 4),
                value,
                value,
                conv,
                conv,
            ]
            for _ in range(stack.num_layers):
                states += [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        return states

    def get_feature_masks(self, x: Tensor) -> list[float] | list[Tensor]:
        """In training, what each stack multiplies its features by: a dropout of its upper channels, by
        sequence.

        One mask for the lower and one for the upper half of the channels beyond `encoder_unmasked_dim` holds
        for all stacks; the latter drops all that the former does and more.

        Args:
            x: (T, batch, encoder_dim[0]), for its batch, dtype and device.

        Returns:
            One (1, batch, encoder_dim[i]) for each stack; 1.0 for each in eval mode.
        """
        if not self.training:
            return [1.0] * len(self.encoder_dim)
        batch = x.shape[1]
        if x.shape[2] != self.encoder_dim[0]:
            raise ValueError(f"x: wanted {self.encoder_dim[0]} channels in training, got {tuple(x.shape)}")
        lower = torch.rand(1, batch, 1, device=x.device) > FEATURE_MASK_DROPOUT
        upper = lower & (torch.rand(1, batch, 1, device=x.device) > FEATURE_MASK_DROPOUT)
        ones = torch.ones_like(lower)
        masks = []
        for channels, unmasked in zip(self.encoder_dim, self.encoder_unmasked_dim, strict=True):
            half = (channels - unmasked) // 2
            pieces = [(ones, unmasked), (lower, half), (upper, channels - unmasked - half)]
            masks.append(torch.cat([mask.expand(-1, -1, size) for mask, size in pieces], dim=-1).to(x.dtype))
        return masks

    def get_chunk_info(self) -> tuple[int, int]:
        """Picks a chunk size and a number of chunks of left context; -1 for no chunks and for no limit."""
        if not self.causal:
            return -1, -1
        chunk_size = self._pick("chunk_size")
        if chunk_size == -1:
            return -1, -1
        left_context_frames = self._pick("left_context_frames")
        if left_context_frames == -1:
            return chunk_size, -1
        return chunk_size, max(left_context_frames // chunk_size, 1)

    def _pick(self, name: str) -> int:
        choices = getattr(self, name)
        if not being_traced():
            return random.choice(choices)
        if len(choices) != 1:
            raise ValueError(f"{name}: tracing needs a model with a single choice, got {choices}")
        return choices[0]

    def _get_attn_mask(self, chunk_size: int, left_context_chunks: int) -> ChunkMask | None:
        """The rule of chunk-causal attention at the full frame rate; None for no chunks."""
        if chunk_size <= 0:
            return None
        if any(chunk_size % ds for ds in self.downsampling_factor):
            raise ValueError(
                f"chunk_size: wanted a multiple of all downsampling factors {self.downsampling_factor}, "
                f"got {chunk_size}"
            )
        needed = max(
            kernel // 2 * ds for kernel, ds in zip(self.cnn_module_kernel, self.downsampling_factor, strict=True)
        )
        if 0 <= chunk_size * left_context_chunks < needed:
            raise ValueError(
                f"left_context_frames: the convolutions need {needed}, got {left_context_chunks} chunks of {chunk_size}"
            )
        return ChunkMask(chunk_size, left_context_chunks)

    def _fitted(self, x: Tensor, i: int) -> Tensor:
        """x with the channels of stack i, but for those that are zero, where that stack takes x without them."""
        stack, channels = self.encoders[i], self.encoder_dim[i]
        if x.shape[-1] < channels and type(stack) is DownsampledZipformerEncoder and stack.takes_fewer_channels(x):
            return x
        return convert_num_channels(x, channels)

    def _handed_on(self, x: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        """What the next stack takes of the output of stack i, and what the encoder's output does.

        The latter has the last stack's output, and of the channels beyond it those of the latest stack that has them.
        No channel goes both ways, so gradients of both are written side by side, and none are added.
        """
        following = self.encoder_dim[i + 1 :]
        if not following:
            return x, x
        taken, start, channels = following[0], max(following), self.encoder_dim[i]
        if start >= channels:
            return x, None
        if being_traced():
            return x[..., :taken], x[..., start:]
        sizes = [size for size in (taken, start - taken, channels - start) if size > 0]
        parts = x.split(sizes, dim=-1)
        return parts[0], parts[-1]

    def _finish(self, pieces: list[Tensor | None], x_lens: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.output_downsampling_factor
        x = self.downsample_output(_joined(pieces))
        return x, (x_lens + (factor - 1)) // factor

    def _check_input(self, x: Tensor, x_lens: Tensor) -> None:
        if x.ndim != 3 or x.shape[0] == 0:
            raise ValueError(f"x: wanted (frames, batch, channels) with at least one frame, got {tuple(x.shape)}")
        check_lengths(x_lens, x.shape[1])


Zipformer2 = Zipformer


def join_interface(encoder: Zipformer) -> None:
    """Makes our encoders instances of icefall's ``EncoderInterface`` too, where that can be imported.

    A recipe's ``model.py`` asserts that its encoder is one. The interface is a plain module in a file of the recipe,
    ``encoder_interface.py``, without a metaclass with which something could be registered: it must be among the bases.
    That adds no behaviour, for all that the interface has is a ``forward`` that raises.
    """
    try:
        from encoder_interface import EncoderInterface
    except ImportError:
        return
    if not isinstance(encoder, EncoderInterface):
        others = [base for base in Zipformer.__bases__ if base is not nn.Module]
        # A subclass that names the interface before ours must keep its order, and is an instance already.
        with contextlib.suppress(TypeError):
            Zipformer.__bases__ = (*others, EncoderInterface)


def convert_num_channels(x: Tensor, num_channels: int) -> Tensor:
    """Crops the channels of x, its last dimension, or fills them up with zeros."""
    missing = num_channels - x.shape[-1]
    return x[..., :num_channels] if missing <= 0 else nn.functional.pad(x, (0, missing))


def _checked_padding(mask: Tensor | None, batch: int, frames: int) -> Tensor | None:
    mask = as_mask("src_key_padding_mask", mask)
    if mask is not None and mask.shape != (batch, frames):
        raise ValueError(f"src_key_padding_mask: wanted shape {(batch, frames)}, got {tuple(mask.shape)}")
    return mask


def _joined(pieces: list[Tensor | None]) -> Tensor:
    """The stacks' pieces of the output, side by side, the last stack's first."""
    there = [piece for piece in reversed(pieces) if piece is not None]
    return torch.cat(there, dim=-1) if len(there) > 1 else there[0]


def _every(mask: Tensor | None, step: int) -> Tensor | None:
    """Every so many frames of a mask; close together, for all layers of a stack."""
    if mask is None or step == 1:
        return mask
    return mask[..., ::step] if being_traced() else mask[..., ::step].contiguous()
