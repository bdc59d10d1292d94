"""The two ways to hold attention weights: stored whole, or computed again by every use."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.autograd import gradient_hook
from zipformer_kernels.core.call import autocast_dtype, barred, watcher
from zipformer_kernels.ops.attention import reference, stored
from zipformer_kernels.ops.attention.cpu import stores
from zipformer_kernels.ops.attention.op import _op
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores
from zipformer_kernels.ops.attention.stored import Piece


class Place(NamedTuple):
    """Where uses of weights run.

    Attributes:
        backend: the backend that was chosen for them.
        named: whether it was asked for by name, so that a use that it cannot serve raises.
    """

    backend: str
    named: bool

    def must_fall_back(self, *tensors: Tensor) -> bool:
        """Whether a use of the tensors must run on the reference, whatever backend the weights are on.

        Raises:
            BackendError: it must, and a backend was asked for by name.
        """
        reason = None if self.backend == "eager" else barred(tensors, watcher())
        if reason is not None and self.named:
            raise backends.BackendError(f"attention: backend {self.backend!r} cannot serve this call: {reason}")
        return reason is not None


class Use(Protocol):
    """A use of weights, such as to average values, in two ways; iterating over it gives its tensors."""

    def of_stored(self, pieces: tuple[Piece, ...]) -> Tensor:
        """The result, from the weights themselves."""

    def of_scores(self, weights: RecomputedWeights) -> Tensor:
        """The result by an op that computes the weights again."""


class Weights(Protocol):
    """What holds weights W.

    Attributes:
        shape: of W, (H, B, T, S).
        place: where uses run.
    """

    shape: tuple[int, int, int, int]
    place: Place

    def of_heads(self, heads: slice) -> Weights:
        """The weights of some heads."""

    def constant(self) -> Weights:
        """Weights that are equal for every source with W > 0, without a gradient."""

    def use(self, use: Use) -> Tensor:
        """The result of a use."""

    def materialize(self) -> Tensor:
        """W itself, differentiable."""


class StoredWeights:
    """Weights that are stored whole: made at their first use, and once more where gradients are first wanted.

    Args:
        scores, masks, penalty: what they are made from.
        place: where uses run: ``eager``, or ``cpu`` while the weights are small.
    """

    def __init__(self, scores: Scores, masks: Masks, penalty: Penalty, place: Place) -> None:
        self.shape = shape_of(scores)
        self.scores, self.masks, self.penalty, self.place = scores, masks, penalty, place
        self._made: tuple[Piece, ...] = ()

    def of_heads(self, heads: slice) -> Weights:
        """The weights of some heads, which are made with the others."""
        return _HeadsOfStored(self, heads)

    def constant(self) -> Weights:
        """A masked mean of the sources that have any weight."""
        return _Given(tuple(Piece(masked_mean(piece.w)) for piece in self.pieces()), self)

    def use(self, use: Use) -> Tensor:
        """The result of a use of W. Raises `BackendError` where the backend asked for cannot serve it."""
        self.place.must_fall_back(*use)  # for what it raises: what serves no kernel multiplies with the tensor
        return use.of_stored(self.pieces())

    def materialize(self) -> Tensor:
        """W in one piece."""
        pieces = [piece.w for piece in self.pieces()]
        # An alias, for the gradient of the piece itself lacks what uses leave.
        return torch.cat(pieces) if len(pieces) > 1 else torch.ops.aten.alias(pieces[0])

    def pieces(self) -> tuple[Piece, ...]:
        """W in pieces by head. On ``cpu`` the first head, which nonlin_attention takes, may lie apart."""
        trained = wants_gradients(self.scores)
        if self._made and (self._made[0].w.requires_grad or not trained):
            return self._made
        if self.place.must_fall_back():
            return (Piece(dense(self.scores, self.masks, self.penalty)),)
        self._made = self._make(trained)
        return self._made

    def _make(self, trained: bool) -> tuple[Piece, ...]:
        if self.place.backend == "eager":
            return (Piece(dense(self.scores, self.masks, self.penalty)),)
        # A slice's gradient is as large as its base; and together all heads may be too large to be stored.
        apart = torch.is_grad_enabled() or not stores(*self.shape, self.scores.q.dtype)
        groups = (slice(0, 1), slice(1, None)) if apart and self.shape[0] > 1 else (slice(None),)
        if trained and watcher() is None:
            return stored.make(groups, self.scores, self.masks, self.penalty)
        weights, rest = _op.variants["weights"], (*self.masks, *self.penalty)
        return tuple(Piece(weights(*self.scores.of_heads(g), *rest, backend=self.place.backend)) for g in groups)


class _HeadsOfStored(StoredWeights):
    """Some heads of stored weights, which are made with the others."""

    def __init__(self, whole: StoredWeights, heads: slice) -> None:
        self.shape = len(range(whole.shape[0])[heads]), *whole.shape[1:]
        self.place, self._whole, self._heads = whole.place, whole, heads

    def pieces(self) -> tuple[Piece, ...]:
        return stored.of_heads(self._whole.pieces(), self._heads)


class _Given(StoredWeights):
    """Weights that were made in another way, in the place of others."""

    def __init__(self, pieces: tuple[Piece, ...], instead_of: StoredWeights) -> None:
        self.shape, self.place, self._made = instead_of.shape, instead_of.place, pieces

    def pieces(self) -> tuple[Piece, ...]:
        return self._made


class RecomputedWeights:
    """Weights that every use computes again, from the scores and two numbers for each target.

    Args:
        scores, masks, penalty: what they are made from.
        place: where uses run.

    Attributes:
        softmax: for each target the largest of its masked scores and 1 / sum_j exp(s - largest), (H, B, T, 2).
    """

    def __init__(self, scores: Scores, masks: Masks, penalty: Penalty, place: Place) -> None:
        self.shape = shape_of(scores)
        if place.backend == "triton" and scores.e is not None:
            scores = scores._replace(e=_offsets_last(scores.e))
        self.scores, self.masks, self.penalty, self.place = scores, masks, penalty, place
        self.softmax = _op.variants["softmax"](*without_gradients(scores), *masks, backend=place.backend)

    def of_heads(self, heads: slice) -> Weights:
        """The weights of some heads, with what the whole has computed."""
        part = object.__new__(RecomputedWeights)
        part.shape = len(range(self.shape[0])[heads]), *self.shape[1:]
        part.scores, part.softmax = self.scores.of_heads(heads), self.softmax[heads]
        part.masks, part.penalty, part.place = self.masks, Penalty(), self.place  # the whole's uses bring the penalty
        return part

    def constant(self) -> Weights:
        """The weights of zeros, positions included: the same compiled kernels serve them.

        They count every source that is not masked, also one whose weight would underflow to zero.
        """
        zeros = self.scores.each(lambda x: torch.zeros_like(x, requires_grad=False))
        return held_in(self.place, zeros, self.masks, Penalty())

    def use(self, use: Use) -> Tensor:
        """The result by an op; of W by torch's operations where no kernel may serve the use."""
        if self.place.must_fall_back(*use):
            return use.of_stored((Piece(self.materialize()),))
        return use.of_scores(self)

    def materialize(self) -> Tensor:
        """W by torch's operations, made anew by each call."""
        return dense(self.scores, self.masks, self.take_penalty())

    def take_penalty(self) -> Penalty:
        """The penalty, for the first use that has gradients, which brings it for all; none for those that follow."""
        penalty = self.penalty
        if wants_gradients(self.scores):
            self.penalty = Penalty()
        return penalty


def hold(scores: Scores, masks: Masks, penalty: Penalty, backend: str | None) -> Weights:
    """The weights, held as suits the backend that they get and their size. Raises `BackendError`."""
    name = _op.variants["softmax"].select(backend, *without_gradients(scores), *masks)
    return held_in(Place(name, backends.requested(backend) != "auto"), scores, masks, penalty)


def held_in(place: Place, scores: Scores, masks: Masks, penalty: Penalty) -> Weights:
    """The weights, held as suits their size in a place."""
    heads, *others = shape_of(scores)
    small = place.backend == "cpu" and stores(max(heads - 1, 1), *others, scores.q.dtype)  # the first may lie apart
    kind = StoredWeights if place.backend == "eager" or small else RecomputedWeights
    return kind(scores, masks, penalty, place)


def shape_of(scores: Scores) -> tuple[int, int, int, int]:
    """The shape of the weights, (H, B, T, S)."""
    targets, batch, heads = scores.q.shape[:3]
    return heads, batch, targets, scores.k.shape[0]


def wants_gradients(scores: Scores) -> bool:
    """Whether a use has gradients of the scores."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in scores)


def without_gradients(scores: Scores) -> Scores:
    """The same scores, constants."""
    return scores.each(lambda x: x.detach()) if torch.is_grad_enabled() else scores


def dense(scores: Scores, masks: Masks, penalty: Penalty) -> Tensor:
    """W by torch's operations, differentiable; under autocast in the autocast dtype, as upstream stores it."""
    raw = reference.scores(*scores)
    if penalty.weight != 0.0:
        raw = penalized(raw, *penalty)
    mask = reference.forbidden(raw.shape[1:], masks, scores.q.device)
    return softmax(raw if mask is None else reference.masked(raw, mask), dim=-1)


def masked_mean(weights: Tensor) -> Tensor:
    """The same weight for every source that has any."""
    seen = (weights > 0.0).to(weights.dtype)
    return seen * (1.0 / seen.sum(dim=-1, keepdim=True))


def penalized(scores: Tensor, penalty: float, limit: float) -> Tensor:
    """Returns the scores; their gradient gains that of the loss ``penalty * relu(abs(scores) - limit).sum()``."""
    over = (scores > limit).to(torch.int8) - (scores < -limit).to(torch.int8)
    return gradient_hook(scores, lambda grad, over: torch.add(grad, over, alpha=penalty), over)


def softmax(x: Tensor, dim: int) -> Tensor:
    """The softmax along a dimension; under autocast in the autocast dtype, as upstream's."""
    y = x.softmax(dim)
    return y.to(autocast_dtype(x) or y.dtype)


def _offsets_last(e: Tensor) -> Tensor:
    """e, (offsets, H, P), with the offsets side by side in memory, as GPU kernels read it; copied once for all uses."""
    return e.permute(1, 2, 0).contiguous().permute(2, 0, 1)
