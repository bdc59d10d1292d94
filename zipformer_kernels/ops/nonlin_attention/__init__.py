"""The middle of NonlinAttention: values gated by tanh, averaged with shared weights, and gated again.

With W the weights of an `AttentionWeights` (T targets, as many sources)::

    out = (W (x tanh(gate))) y

The first gate is applied as values are read, the second as results are written. Saved for the backward pass are the
inputs and the average before the second gate.

Source: section 3.1 of the Zipformer paper (arXiv:2310.11230); ``NonlinAttention`` in upstream's ``zipformer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.core.op import Op, triton_launchers
from zipformer_kernels.ops.attention import AttentionWeights, RecomputedWeights
from zipformer_kernels.ops.attention.deferred import Piece, average
from zipformer_kernels.ops.attention.stored import dense_average
from zipformer_kernels.ops.nonlin_attention import cpu, cuda, deferred, eager, reference
from zipformer_kernels.ops.nonlin_attention.gates import BY_TORCH, GatedLaunchers, Gates
from zipformer_kernels.ops.sizes import split_last

_op = Op(
    "nonlin_attention",
    "Tensor q, Tensor k, Tensor? p, Tensor? e, Tensor gate, Tensor x, Tensor y, Tensor softmax, "
    "Tensor? key_padding_mask, Tensor? attn_mask, int chunk, int left_chunks",
    reference=reference.nonlin_attention,
    backends={
        "eager": eager.launchers,
        "cpu": cpu.launchers,
        **triton_launchers(__name__),
        "cuda": cuda.launchers,
    },
    saves=("q", "k", "p", "e", "gate", "x", "y", "softmax", "key_padding_mask", "attn_mask"),
    extras=1,
    fake=lambda q, k, p, e, gate, x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)

_op.variant(
    "infer",
    "Tensor projected, Tensor? bias, Tensor weights",
    when="the thirds of a projection less its bias, without gradients, with weights that are stored",
    reference=reference.infer,
    saves=(),
    fake=lambda projected, *_: (projected.new_empty(*projected.shape[:2], projected.shape[2] // 3),),
)


def nonlin_attention(weights: AttentionWeights, gate: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(W (x tanh(gate))) y on the backend of the weights.

    Args:
        weights: (H, B, T, T), of one head in the encoder.
        gate, x, y: (T, B, H * C), of one dtype.
    Returns:
        (T, B, H * C).
    Raises:
        ValueError: a shape does not fit the weights.
    """
    heads, batch, targets, sources = weights.shape
    for name, tensor in (("gate", gate), ("x", x), ("y", y)):
        if tensor.ndim != 3 or tensor.shape != x.shape or tensor.shape[:2] != (targets, batch):
            raise ValueError(
                f"{name} must be (targets, batch, heads * channels) = ({targets}, {batch}, {heads} * channels) "
                f"as the others are, got {tuple(tensor.shape)}"
            )
    if sources != targets:
        raise ValueError(f"weights must have as many sources as targets, got {sources} and {targets}")
    return weights.use(_Gated(gate, x, y))


def gates_of(backend: str) -> Gates:
    """The gates of a backend, or torch's."""
    launchers = _op.backends.get(backend)
    return launchers.gates if isinstance(launchers, GatedLaunchers) else BY_TORCH


class _Gated(NamedTuple):
    """The use of weights that averages x tanh(gate) and gates the averages by y, all (T, B, H * C)."""

    gate: Tensor
    x: Tensor
    y: Tensor

    def deferred(self, pieces: Sequence[Piece], backend: str) -> Tensor | None:
        """In one function where one piece is to be read, else by parts."""
        if deferred.serves(pieces, *self):
            return deferred.gated_average(gates_of(backend), *pieces, *self)
        values = self._values(sum(map(len, pieces)))
        if all(piece.serves(values) for piece in pieces):
            return self.y * average(pieces, values).flatten(2)
        return None

    def of_tensors(self, weights: Sequence[Tensor]) -> Tensor:
        """By the operations of torch."""
        return self.y * dense_average(weights, self._values(sum(w.shape[0] for w in weights))).flatten(2)

    def of_scores(self, weights: RecomputedWeights) -> Tensor:
        """By the op."""
        split = (split_last(t, weights.shape[0]) for t in self)
        args = *weights.scores, *split, weights.softmax, *weights.masks
        return _op(*args, backend=weights.place.backend).flatten(2)

    def _values(self, heads: int) -> Tensor:
        return split_last(self.x * torch.tanh(self.gate), heads)


__all__ = ["gates_of", "nonlin_attention"]
