"""The two ways to hold attention weights: stored whole, or computed again by every use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zipformer_kernels.core import backend as backends
from zipformer_kernels.core.call import barred, watcher, without_autocast
from zipformer_kernels.ops.attention import deferred, recomputed, stored
from zipformer_kernels.ops.attention.budget import fits, stores
from zipformer_kernels.ops.attention.deferred import Piece
from zipformer_kernels.ops.attention.dense import dense, masked_mean
from zipformer_kernels.ops.attention.launchers import AttentionLaunchers
from zipformer_kernels.ops.attention.op import _op
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores


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


class Task(Protocol):
    """What weights are used for, such as to average values; iterating over it gives its tensors."""

    def deferred(self, pieces: Sequence[Piece], backend: str) -> Tensor | None:
        """The result of weights in pieces by head, which leaves its part of the gradient; None where it cannot."""

    def of_tensors(self, weights: Sequence[Tensor]) -> Tensor:
        """The result by torch's operations, of weights in tensors by head."""

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

    def use(self, task: Task) -> Tensor:
        """The result of a use."""

    def deferred_pieces(self, dtype: torch.dtype) -> tuple[Piece, ...]:
        """As `zipformer_kernels.ops.attention.weights.deferred_pieces`."""

    def materialize(self) -> Tensor:
        """W itself, differentiable."""


class StoredWeights:
    """Weights that are stored whole: made at their first use, and once more where gradients are first wanted.

    Args:
        scores, masks, penalty: what they are made from.
        place: where uses run: ``eager``, or a backend that can store weights, while they are small.
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
        constants = (masked_mean(stored.tensor(piece)).detach() for piece in self.pieces())
        return _Given(tuple(stored.given(w, deferred.Uses()) for w in constants), self)

    def use(self, task: Task) -> Tensor:
        """The result of a use of W. Raises `BackendError` where the backend asked for cannot serve it."""
        self.place.must_fall_back(*task)  # for what it raises: what serves no kernel multiplies with the tensor
        pieces = self.pieces()
        result = None if self.place.backend == "eager" else task.deferred(pieces, self.place.backend)
        return task.of_tensors([stored.tensor(piece) for piece in pieces]) if result is None else result

    def deferred_pieces(self, dtype: torch.dtype) -> tuple[Piece, ...]:
        """The pieces, for a node that reads them itself."""
        if self.place.backend == "eager" or self.place.must_fall_back():
            return ()
        pieces = self.pieces()
        return pieces if all(piece.reads(dtype) for piece in pieces) else ()

    def materialize(self) -> Tensor:
        """W in one piece."""
        pieces = [stored.tensor(piece) for piece in self.pieces()]
        # An alias, for the gradient of the piece itself lacks what uses leave.
        return torch.cat(pieces) if len(pieces) > 1 else torch.ops.aten.alias(pieces[0])

    def pieces(self) -> tuple[Piece, ...]:
        """W in pieces by head."""
        trained = wants_gradients(self.scores)
        if self._made and (self._made[0].trained or not trained):
            return self._made
        if self.place.must_fall_back():
            return (stored.given(dense(self.scores, self.masks, self.penalty)),)
        self._made = self._make(trained)
        return self._made

    def _make(self, trained: bool) -> tuple[Piece, ...]:
        backend, heads = self.place.backend, self.shape[0]
        if backend == "eager":
            return (stored.given(dense(self.scores, self.masks, self.penalty)),)
        # Each piece is small enough for memory that the CPU's allocator keeps; on a GPU one product serves all heads.
        apart = backend == "cpu" and heads > 1
        apart = apart and (torch.is_grad_enabled() or not stores(*self.shape, self.scores.q.dtype))
        groups = (slice(0, 1), slice(1, heads)) if apart else (slice(0, heads),)
        launchers, rest = _op.backends[backend], (*self.masks, *self.penalty)
        if watcher() is None:
            if trained:
                return stored.make(launchers, groups, self.scores, self.masks, self.penalty)
            made = [without_autocast(launchers.make_weights, *self.scores.of_heads(g), *rest)[0] for g in groups]
            return tuple(stored.given(w, deferred.Uses()) for w in made)
        weights = _op.variants["weights"]
        return tuple(stored.given(weights(*self.scores.of_heads(g), *rest, backend=backend)) for g in groups)


class _HeadsOfStored(StoredWeights):
    """Some heads of stored weights, which are made with the others."""

    def __init__(self, whole: StoredWeights, heads: slice) -> None:
        self.shape = len(range(whole.shape[0])[heads]), *whole.shape[1:]
        self.place, self._whole, self._heads = whole.place, whole, heads

    def pieces(self) -> tuple[Piece, ...]:
        return deferred.of_heads(self._whole.pieces(), self._heads)


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
        self.scores, self.masks, self.penalty, self.place = scores, masks, penalty, place
        self.softmax = _op.variants["softmax"](*without_gradients(scores), *masks, backend=place.backend)
        self._made: tuple[Piece, ...] = ()
        self.pieces()  # here, so that a use that checkpointing runs again finds what it found before

    def of_heads(self, heads: slice) -> Weights:
        """The weights of some heads, with what the whole has computed."""
        return _HeadsOfRecomputed(self, heads)

    def constant(self) -> Weights:
        """The weights of zeros, positions included: the same compiled kernels serve them.

        They count every source that is not masked, also one whose weight would underflow to zero.
        """
        zeros = self.scores.each(lambda x: torch.zeros_like(x, requires_grad=False))
        return RecomputedWeights(zeros, self.masks, Penalty(), self.place)

    def use(self, task: Task) -> Tensor:
        """The result by kernels; of W by torch's operations where none may serve the use."""
        if self.place.must_fall_back(*task):
            return task.of_tensors([self.materialize()])
        pieces = self.pieces()
        result = task.deferred(pieces, self.place.backend) if pieces else None
        if result is None:
            return task.of_scores(self)
        self.leave_penalty()
        return result

    def deferred_pieces(self, dtype: torch.dtype) -> tuple[Piece, ...]:
        """The pieces, for a node that reads them itself."""
        if self.place.must_fall_back():
            return ()
        pieces = self.pieces()
        if not all(piece.reads(dtype) for piece in pieces):
            return ()
        if pieces:
            self.leave_penalty()
        return pieces

    def materialize(self) -> Tensor:
        """W by torch's operations, made anew by each call."""
        return dense(self.scores, self.masks, self.take_penalty())

    def pieces(self) -> tuple[Piece, ...]:
        """The weights for uses that leave their part of the gradient; none where uses cannot."""
        if self._made and (self._made[0].trained or not wants_gradients(self.scores)):
            return self._made
        launchers = _op.backends[self.place.backend]
        if torch.is_grad_enabled() and isinstance(launchers, AttentionLaunchers) and watcher() is None:
            self._made = (recomputed.make(launchers, self.scores, self.softmax, self.masks),)
        return self._made

    def take_penalty(self) -> Penalty:
        """The penalty, for the first use that has gradients, which brings it for all; none for those that follow."""
        penalty = self.penalty
        if wants_gradients(self.scores):
            self.penalty = Penalty()
        return penalty

    def leave_penalty(self) -> None:
        """Has the backward of the weights bring the penalty, if none has taken it."""
        if self.penalty.weight != 0.0:
            self._made[0].uses.penalty = self.take_penalty()


class _HeadsOfRecomputed(RecomputedWeights):
    """Some heads of weights that are computed again; the whole brings the penalty."""

    def __init__(self, whole: RecomputedWeights, heads: slice) -> None:
        self.shape = len(range(whole.shape[0])[heads]), *whole.shape[1:]
        self.scores, self.softmax = whole.scores.of_heads(heads), whole.softmax[heads]
        self.masks, self.penalty, self.place = whole.masks, Penalty(), whole.place
        self._whole, self._heads = whole, heads

    def pieces(self) -> tuple[Piece, ...]:
        return deferred.of_heads(self._whole.pieces(), self._heads)

    def leave_penalty(self) -> None:
        self._whole.leave_penalty()


def hold(
    scores: Scores, masks: Masks, penalty: Penalty, backend: str | None, stored_bytes: int | None = None
) -> Weights:
    """The weights, held as suits the backend that they get and their size. Raises `BackendError`."""
    name = _op.variants["softmax"].select(backend, *scores, *masks)
    place = Place(name, backends.requested(backend) != "auto")
    kind = StoredWeights if name == "eager" or fits(name, scores, stored_bytes) else RecomputedWeights
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
