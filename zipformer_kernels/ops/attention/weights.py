"""The handle that stands for attention weights: it aggregates values, and makes the weights themselves on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipformer_kernels.ops.attention import deferred, stored
from zipformer_kernels.ops.attention.deferred import Piece
from zipformer_kernels.ops.attention.dense import masked_mean
from zipformer_kernels.ops.attention.held import RecomputedWeights, Task, Weights, hold
from zipformer_kernels.ops.attention.masks import ChunkMask, checked
from zipformer_kernels.ops.attention.op import _op
from zipformer_kernels.ops.attention.scores import Penalty
from zipformer_kernels.ops.sizes import compact, merge_heads, split_heads, split_last


class AttentionWeights:
    """Weights W of shape (H, B, T, S), computed once and used many times.

    It has W's `shape`, `dtype` and `device`, slices by head (``weights[0:1]``), aggregates values, and `materialize`s W
    for code that wants a tensor. Torch's functions, operators, other indices and the methods of a tensor do that by
    themselves; only what would change W in place is refused.

    Attributes:
        held: how they are held: `StoredWeights` on ``eager``, and on ``cpu`` and ``triton`` while they are small; else
            `RecomputedWeights`.
        backend: the backend that every use runs on; the reference where values are not plain tensors or a mode looks
            on, unless a backend was asked for by name, which then raises.

    Args:
        q: queries (T, B, H, D).
        k: keys (S, B, H, D).
        p: position queries (T, B, H, P), or None for no positional term.
        e: position projections (T + S - 1, H, P), or (B, T + S - 1, H, P) on ``eager``, or None.
        key_padding_mask: (B, S), bools, or integers other than 0, for sources that no target may attend to.
        attn_mask: bool (T, S) or (B, T, S), True where a target may not attend to a source, or a `ChunkMask`.
        penalty, limit: the gradient of the scores gains penalty sign(s) where abs(s) > limit, once for all uses.
        backend: which backend to use; see `zipformer_kernels.core.backend`.
        stored_bytes: below how many bytes ``cpu`` (which does not count the first head) and ``triton`` store them, 0:
            never; by default as tuned, ``attention.stored_bytes`` for tensors on the CPU, and on a GPU a share of its
            memory, ``attention.stored_share``. Results agree up to rounding whatever it is.
    Raises:
        ValueError: a shape does not fit the others.
        TypeError: key_padding_mask is neither of bools nor of integers, or attn_mask not of bools.
        BackendError: `backend` cannot serve the call.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        p: Tensor | None = None,
        e: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | ChunkMask | None = None,
        penalty: float = 0.0,
        limit: float = 0.0,
        backend: str | None = None,
        stored_bytes: int | None = None,
    ) -> None:
        scores, masks = checked(q, k, p, e, key_padding_mask, attn_mask)
        held = hold(scores, masks, Penalty(penalty, limit), backend, stored_bytes)
        self._hold(held, q.dtype, q.device)

    def _hold(self, held: Weights, dtype: torch.dtype, device: torch.device) -> AttentionWeights:
        self.held, self.shape, self.backend = held, held.shape, held.place.backend
        self.dtype, self.device = dtype, device
        return self

    def _with(self, held: Weights) -> AttentionWeights:
        """The handle of other weights, made of these."""
        return object.__new__(AttentionWeights)._hold(held, self.dtype, self.device)

    def __getitem__(self, heads: Any) -> AttentionWeights | Tensor:
        """The weights of some heads, ``weights[first:last]``; for any other index what W has there."""
        if not isinstance(heads, slice) or heads.step not in (None, 1):
            return self.materialize()[heads]
        return self._with(self.held.of_heads(heads))

    def constant(self) -> AttentionWeights:
        """Weights that are equal for every source with W > 0: a masked mean. They carry no gradient."""
        return self._with(self.held.constant())

    def use(self, task: Task) -> Tensor:
        """The result of a use of the weights, on their backend."""
        return self.held.use(task)

    def aggregate(self, values: Tensor) -> Tensor:
        """The average of the values with the weights, for each head.

        Args:
            values: (S, B, H * C), in the dtype of q.
        Returns:
            (T, B, H * C).
        Raises:
            ValueError: the values' shape does not fit the weights.
        """
        _check_values(self.shape, values)
        return self.held.use(Average(split_last(values, self.shape[0]))).flatten(2)

    def materialize(self) -> Tensor:
        """W itself, (H, B, T, S), differentiable; under autocast in the autocast dtype, as upstream stores it."""
        return self.held.materialize()

    def __getattr__(self, name: str) -> Any:
        """What W has and a handle has not, such as ``clone``, for code that was written for a tensor."""
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name.endswith("_"):
            raise TypeError(f"{name}: attention weights cannot be changed in place; use a copy: weights.materialize()")
        return getattr(self.materialize(), name)

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        dense = lambda x: x.materialize() if isinstance(x, AttentionWeights) else x  # noqa: E731
        return function(*map(dense, args), **{name: dense(x) for name, x in (kwargs or {}).items()})

    def __repr__(self) -> str:
        return f"AttentionWeights(shape={tuple(self.shape)}, dtype={self.dtype}, backend={self.backend!r})"


def _operator(name: str) -> Any:
    return lambda self, *others: getattr(self.materialize(), name)(*others)


OPERATORS = "neg add radd sub rsub mul rmul truediv rtruediv pow matmul rmatmul lt le gt ge"  # which classes must have

for _name in (f"__{name}__" for name in OPERATORS.split()):
    setattr(AttentionWeights, _name, _operator(_name))


class Average(NamedTuple):
    """The use of weights that averages values, (S, B, H, C)."""

    values: Tensor

    def deferred(self, pieces: Sequence[Piece], backend: str) -> Tensor | None:
        """W V by the backend's parts."""
        if all(piece.serves(self.values) for piece in pieces):
            return deferred.average(pieces, self.values)
        return None

    def of_tensors(self, weights: Sequence[Tensor]) -> Tensor:
        """W V by the products of torch."""
        return stored.dense_average(weights, self.values)

    def of_scores(self, weights: RecomputedWeights) -> Tensor:
        """W V by the op."""
        rest = *weights.masks, *weights.take_penalty()
        return _op(*weights.scores, self.values, weights.softmax, *rest, backend=weights.place.backend)


def attention_weights(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    e: Tensor | None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | ChunkMask | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """W itself, (H, B, T, S); arguments and errors as of `AttentionWeights`."""
    scores, masks = checked(q, k, p, e, key_padding_mask, attn_mask)
    return _op.variants["weights"](*scores, *masks, *Penalty(), backend=backend)


def aggregate(weights: AttentionWeights | Tensor, values: Tensor) -> Tensor:
    """The average of the values with weights, for each head; see `AttentionWeights.aggregate`.

    Args:
        weights: a handle, or a tensor (H, B, T, S) such as upstream's modules make.
        values: (S, B, H * C).
    Returns:
        (T, B, H * C).
    Raises:
        ValueError: the values' shape does not fit the weights.
    """
    if isinstance(weights, AttentionWeights):
        return weights.aggregate(values)
    _check_values(weights.shape, values)
    return merge_heads(weights @ compact(split_heads(values, weights.shape[0])))


def deferred_pieces(weights: AttentionWeights | Tensor, dtype: torch.dtype) -> tuple[Piece, ...]:
    """The pieces of weights for a node that reads them itself and leaves its part of their gradient.

    It stands for a use: the penalty on scores counts as taken. None come where the use has to go another way: without
    gradients, by the reference, or of weights in a tensor.

    Args:
        weights: as of `aggregate`.
        dtype: of the values.
    """
    if not torch.is_grad_enabled() or isinstance(weights, Tensor):
        return ()
    return weights.held.deferred_pieces(dtype)


def constant_attention(weights: AttentionWeights | Tensor) -> AttentionWeights | Tensor:
    """The same weight for every source that has any: a masked mean, for NonlinAttention's const_attention_rate.

    Args:
        weights: a handle, or a tensor (H, B, T, S).
    Returns:
        Of the same kind, shape and dtype.
    """
    if isinstance(weights, AttentionWeights):
        return weights.constant()
    return masked_mean(weights)


def _check_values(shape: tuple[int, ...], values: Tensor) -> None:
    heads, batch, _, sources = shape
    if values.ndim != 3 or values.shape[:2] != (sources, batch) or values.shape[2] % heads:
        raise ValueError(
            f"values must be (sources, batch, heads * channels) = ({sources}, {batch}, {heads} * channels), "
            f"got {tuple(values.shape)}"
        )
