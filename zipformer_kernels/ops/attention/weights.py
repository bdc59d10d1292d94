"""The handle that stands for attention weights: it aggregates values, and makes the weights themselves on request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.call import autocast_dtype, barred, watcher
from zipformer_kernels.ops.attention import native, reference
from zipformer_kernels.ops.attention.kept import Piece, average, make
from zipformer_kernels.ops.attention.op import _op
from zipformer_kernels.ops.shapes import as_mask
from zipformer_kernels.ops.sizes import compact, merge_heads, split_heads, split_last


@dataclass(frozen=True)
class ChunkMask:
    """The rule of chunk-causal attention: a target sees its own chunk and some to its left, none to its right.

    Attributes:
        chunk: frames per chunk.
        left_chunks: chunks to the left that a target sees; negative: all of them.
    """

    chunk: int
    left_chunks: int = -1

    def downsample(self, factor: int) -> ChunkMask:
        """The rule at a frame rate lower by `factor`, which must divide `chunk`."""
        if self.chunk % factor != 0:
            raise ValueError(f"chunk must be a multiple of the downsampling factor {factor}, got {self.chunk}")
        return replace(self, chunk=self.chunk // factor)

    def materialize(self, frames: int, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor (frames, frames), True where attention is forbidden."""
        shape = torch.Size((1, frames, frames))
        return reference.forbidden(shape, None, None, self.chunk, self.left_chunks, torch.device(device or "cpu"))[0]


# What some heads of a handle have from the whole.
_SHARED = ("scores", "masks", "dtype", "device", "backend", "keeps", "softmax", "_named", "_made", "_part_of")


class AttentionWeights:
    """Weights W of shape (H, B, T, S), computed once and used many times.

    It has W's `shape`, `dtype` and `device`, slices by head (``weights[0:1]``), aggregates values, and `materialize`s W
    for code that wants a tensor. Torch's functions, operators, other indices and the methods of a tensor do that by
    themselves; only what would change W in place is refused.

    Attributes:
        scores: q, k, p, e; where W is kept, of all heads that it was made of.
        masks: key_padding_mask, attn_mask as a tensor, chunk, left_chunks.
        keeps: whether W itself is made, at its first use, and kept: on ``eager``, and on ``cpu`` while it is small.
            Made without gradients, it is made once more for a use with them.
        softmax: for each target the largest of its masked scores and 1 / sum_j exp(s - largest), (H, B, T, 2); None
            where W is kept.
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
    ) -> None:
        self.shape = q.shape[2], q.shape[1], q.shape[0], k.shape[0]
        key_padding_mask = as_mask("key_padding_mask", key_padding_mask)
        _check(self.shape, q, k, p, e, key_padding_mask, attn_mask)
        rule = attn_mask if isinstance(attn_mask, ChunkMask) else ChunkMask(-1)
        mask = None if isinstance(attn_mask, ChunkMask) else attn_mask
        self.scores = q, k, p, e
        self.masks = key_padding_mask, mask, rule.chunk, rule.left_chunks
        self._penalty = penalty, limit
        self.dtype, self.device = q.dtype, q.device
        detached = self.scores
        if torch.is_grad_enabled():
            detached = tuple(None if x is None else x.detach() for x in self.scores)
        self.backend = _op.variants["softmax"].select(backend, *detached, *self.masks)
        self._named = backends.requested(backend) != "auto"
        self._made: tuple[Piece, ...] = ()
        self._part_of: tuple[AttentionWeights, slice] | None = None  # where W is kept
        self.softmax: Tensor | None = None
        largest = max(self.shape[0] - 1, 1), *self.shape[1:], q.dtype
        self.keeps = self.backend == "eager" or (self.backend == "cpu" and native.stores(*largest))
        if self.backend == "triton" and e is not None:
            self.scores = q, k, p, _offsets_last(e)
            detached = *detached[:3], self.scores[3].detach()
        if not self.keeps:
            self.softmax = _op.variants["softmax"](*detached, *self.masks, backend=self.backend)

    def __getitem__(self, heads: Any) -> AttentionWeights | Tensor:
        """The weights of some heads, ``weights[first:last]``; for any other index what W has there."""
        if not isinstance(heads, slice) or heads.step not in (None, 1):
            return self.materialize()[heads]
        part = object.__new__(AttentionWeights)
        for name in _SHARED:  # by name, for torch.compile before 2.8 cannot record __dict__
            setattr(part, name, getattr(self, name))
        part._penalty = 0.0, 0.0  # the whole's uses bring it
        if self.keeps:
            part._part_of = self, heads
        else:
            part.scores, part.softmax = self._scores_of(heads), self.softmax[heads]
        part.shape = len(range(self.shape[0])[heads]), *self.shape[1:]
        return part

    def constant(self) -> AttentionWeights:
        """Weights that are equal for every source with W > 0: a masked mean. They carry no gradient.

        The fused backends count every source that is not masked, also one whose weight would underflow to zero. Where W
        is not kept they are the weights of zeros, positions included: the same compiled kernels serve them.
        """
        if self.keeps:
            part = self[:]
            part._part_of, part.scores = None, tuple(None if x is None else x.detach() for x in self.scores)
            part._made = tuple(Piece(constant_attention(piece.w)) for piece in self.pieces())
            return part
        key_padding_mask, mask, chunk, left_chunks = self.masks
        equal = AttentionWeights(
            *(None if x is None else torch.zeros_like(x, requires_grad=False) for x in self.scores),
            key_padding_mask=key_padding_mask,
            attn_mask=ChunkMask(chunk, left_chunks) if chunk > 0 else mask,
            backend=self.backend,
        )
        equal._named = self._named
        return equal

    def aggregate(self, values: Tensor) -> Tensor:
        """The average of the values with the weights, for each head.

        Args:
            values: (S, B, H * C), in the dtype of q.
        Returns:
            (T, B, H * C).
        Raises:
            ValueError: the values' shape does not fit the weights.
        """
        heads = self.shape[0]
        _check_values(self.shape, values)
        v = split_last(values, heads)
        falls_back = self.falls_back(values)
        if self.keeps:
            return average(self.pieces(), v).flatten(2)
        if falls_back:
            return average((Piece(self._reference()),), v).flatten(2)
        penalty = self._penalty
        if self._trained():  # the first use that has gradients brings it, for all
            self._penalty = 0.0, 0.0
        return _op(*self.scores, v, self.softmax, *self.masks, *penalty, backend=self.backend).flatten(2)

    def materialize(self) -> Tensor:
        """W itself, (H, B, T, S), differentiable; under autocast in the autocast dtype, as upstream keeps it."""
        if not self.keeps:
            return self._reference()
        pieces = [piece.w for piece in self.pieces()]
        # An alias, for the gradient of the piece itself lacks what uses leave.
        return torch.cat(pieces) if len(pieces) > 1 else torch.ops.aten.alias(pieces[0])

    def pieces(self) -> tuple[Piece, ...]:
        """W where it is kept, made once. On ``cpu`` the first head, which nonlin_attention takes, may lie apart."""
        if self._part_of is not None:
            whole, heads = self._part_of
            return _slice_heads(whole.pieces(), heads)
        trained = self._trained()
        if self._made and (self._made[0].w.requires_grad or not trained):
            return self._made
        if self.falls_back():
            return (Piece(self._reference()),)
        if self.backend == "eager":
            self._made = (Piece(self._reference()),)
            return self._made
        # A slice's gradient is as large as its base; and together all heads may be too large to keep.
        apart = torch.is_grad_enabled() or not native.stores(*self.shape, self.dtype)
        groups = (slice(0, 1), slice(1, None)) if apart and self.shape[0] > 1 else (slice(None),)
        args = *self.masks, *self._penalty
        if trained and watcher() is None:
            self._made = make(groups, *self.scores, *args)
        else:
            made = (_op.variants["weights"](*self._scores_of(g), *args, backend=self.backend) for g in groups)
            self._made = tuple(map(Piece, made))
        return self._made

    def falls_back(self, *values: Tensor) -> bool:
        """Whether a use of the values must run on the reference, whatever backend the weights are on.

        Raises:
            BackendError: it must, and a backend was asked for by name.
        """
        reason = None if self.backend == "eager" else barred(values, watcher())
        if reason is not None and self._named:
            raise backends.BackendError(f"attention: backend {self.backend!r} cannot serve this call: {reason}")
        return reason is not None

    def _trained(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.scores)

    def _scores_of(self, heads: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return tuple(native.of_heads(heads, *self.scores))

    def _reference(self) -> Tensor:
        raw = reference.scores(*self.scores)
        if self._penalty[0] != 0.0:
            raw = penalized(raw, *self._penalty)
        mask = reference.forbidden(raw.shape[1:], *self.masks, self.device)
        return softmax(raw if mask is None else reference.masked(raw, mask), dim=-1)

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


def _slice_heads(pieces: tuple[Piece, ...], heads: slice) -> tuple[Piece, ...]:
    """Some heads of weights in pieces; whole pieces stay themselves, for a slice's gradient is as large as its base."""
    wanted = range(sum(len(piece) for piece in pieces))[heads]
    first, last = wanted.start, wanted.stop
    parts = []
    for piece in pieces:
        begin, end = max(first, 0), min(last, len(piece))
        if begin < end:
            parts.append(piece if end - begin == len(piece) else Piece(piece.w[begin:end]))
        first, last = first - len(piece), last - len(piece)
    return tuple(parts)


def _offsets_last(e: Tensor) -> Tensor:
    """e, (offsets, H, P), with the offsets side by side in memory, as GPU kernels read it; copied once for all uses."""
    return e.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def penalized(scores: Tensor, penalty: float, limit: float) -> Tensor:
    """Returns the scores; their gradient gains that of the loss ``penalty * relu(abs(scores) - limit).sum()``."""
    over = (scores > limit).to(torch.int8) - (scores < -limit).to(torch.int8)
    return gradient_hook(scores, lambda grad, over: torch.add(grad, over, alpha=penalty), over)


def softmax(x: Tensor, dim: int) -> Tensor:
    """The softmax along a dimension; under autocast in the autocast dtype, as upstream's."""
    y = x.softmax(dim)
    return y.to(autocast_dtype(x) or y.dtype)


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


def constant_attention(weights: AttentionWeights | Tensor) -> AttentionWeights | Tensor:
    """The same weight for every source that has any: a masked mean, for NonlinAttention's const_attention_rate.

    Args:
        weights: a handle, or a tensor (H, B, T, S).
    Returns:
        Of the same kind, shape and dtype.
    """
    if isinstance(weights, AttentionWeights):
        return weights.constant()
    seen = (weights > 0.0).to(weights.dtype)
    return seen * (1.0 / seen.sum(dim=-1, keepdim=True))


def downsample_mask(mask: Tensor | ChunkMask | None, factor: int) -> Tensor | ChunkMask | None:
    """The mask at a frame rate lower by `factor`: every factor-th row and column, or the rule of that."""
    if isinstance(mask, ChunkMask):
        return mask.downsample(factor)
    return None if mask is None else mask[..., ::factor, ::factor]


def _check_values(shape: tuple[int, ...], values: Tensor) -> None:
    heads, batch, _, sources = shape
    if values.ndim != 3 or values.shape[:2] != (sources, batch) or values.shape[2] % heads:
        raise ValueError(
            f"values must be (sources, batch, heads * channels) = ({sources}, {batch}, {heads} * channels), "
            f"got {tuple(values.shape)}"
        )


def _check(
    shape: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    e: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | ChunkMask | None,
) -> None:
    heads, batch, targets, sources = shape
    wanted: dict[str, tuple[Tensor | None, tuple[tuple[int, ...], ...]]] = {
        "k": (k, ((sources, batch, heads, q.shape[3]),)),
        "p": (p, ((targets, batch, heads, 0 if p is None else p.shape[-1]),)),
        "e": (
            e,
            (
                (targets + sources - 1, heads, 0 if p is None else p.shape[-1]),
                (batch, targets + sources - 1, heads, 0 if p is None else p.shape[-1]),
            ),
        ),
        "key_padding_mask": (key_padding_mask, ((batch, sources),)),
        "attn_mask": (
            None if isinstance(attn_mask, ChunkMask) else attn_mask,
            ((targets, sources), (batch, targets, sources)),
        ),
    }
    if (p is None) != (e is None):
        raise ValueError("p and e must be given together")
    for name, (x, shapes) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{name} must be of shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
        if name == "attn_mask" and x.dtype != torch.bool:
            raise TypeError(f"{name} must be of dtype bool, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {x.device}")
    if isinstance(attn_mask, ChunkMask) and targets != sources:
        raise ValueError(f"attn_mask: a ChunkMask needs as many sources as targets, got {sources} and {targets}")
