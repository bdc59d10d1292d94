"""Relative positional encodings that resolve near offsets finely and far ones coarsely."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zipformer_kernels.core.call import being_traced, plain, watcher
from zipformer_kernels.core.module import Module
from zipformer_kernels.training import Dropout2, FloatLike


class CompactRelPositionalEncoding(Module):
    """Fourier features of a compressed relative offset, so that a few dozen channels suffice for any length.

    An offset t is compressed to c(t) = sqrt(D) sign(t) (log(|t| + sqrt(D)) - log sqrt(D)), of slope 1 at 0,
    and then mapped into a finite interval by a(t) = atan(2 pi c(t) / (length_factor D)). Channels 2k and 2k +
    1 are cos((k + 1) a) and sin((k + 1) a); the last channel is 1 instead, for a bias. D is `embed_dim`.

    The table is computed in float32 whatever the model's dtype, and cached, where it is plain: one that a
    `FakeTensorMode` or another mode made is of use to its own call only.

    Args:
        embed_dim: D, even.
        dropout_rate: dropout on the encoding.
        max_len: frames the cached table is made for at first; it grows when needed.
        length_factor: at least 1; larger values give less weight to small differences near 0.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, embed_dim: int, dropout_rate: FloatLike, max_len: int = 1000, length_factor: float = 1.0
    ) -> None:
        super().__init__()
        if embed_dim % 2:
            raise ValueError(f"embed_dim must be even, got {embed_dim}")
        if length_factor < 1.0:
            raise ValueError(f"length_factor must be at least 1, got {length_factor}")
        self.embed_dim = embed_dim
        self.dropout = Dropout2(dropout_rate)
        self.max_len = max_len
        self.length_factor = length_factor
        self.pe: Tensor | None = None

    def forward(self, x: Tensor, left_context_len: int = 0) -> Tensor:
        """The encoding of every offset between a frame of x and a frame of x or of its left context L.

        Args:
            x: (T, batch, ...), for its length, dtype and device.
            left_context_len: L.

        Returns:
            (1, L + 2 T - 1, embed_dim), from offset -(L + T - 1) to T - 1.
        """
        frames = x.shape[0]
        if being_traced():
            encoding = self._encode(frames + left_context_len, frames, x.device)
        else:
            table = self._table(frames + left_context_len, x.device)
            zero = table.shape[0] // 2
            encoding = table[zero - (frames + left_context_len) + 1 : zero + frames]
        return self.dropout(encoding.to(x.dtype).unsqueeze(0))

    def _table(self, frames: int, device: torch.device) -> Tensor:
        """The encodings of offsets -(n - 1) to n - 1 for some n >= `frames`."""
        if watcher() is not None:
            return self._encode(frames, frames, device)
        if self.pe is None or self.pe.shape[0] < 2 * frames - 1 or self.pe.device != device or not plain(self.pe):
            longest = max(frames, self.max_len)
            with torch.inference_mode(False), torch.no_grad():  # for whoever trains later, too
                self.pe = self._encode(longest, longest, device)
        return self.pe

    def _encode(self, before: int, after: int, device: torch.device) -> Tensor:
        """The encodings of offsets -(`before` - 1) to `after` - 1."""
        offset = torch.arange(-(before - 1), after, device=device).to(torch.float32).unsqueeze(1)
        order = 1 + torch.arange(self.embed_dim // 2, device=device)
        length = self.embed_dim**0.5
        compressed = length * offset.sign() * ((offset.abs() + length).log() - math.log(length))
        angle = (compressed / (self.length_factor * self.embed_dim / (2.0 * math.pi))).atan() * order
        table = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)
        return torch.cat([table[:, :-1], torch.ones_like(offset)], dim=1)
