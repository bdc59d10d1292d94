"""What attention weights are made from: scores, masks, and a penalty on the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """What scores are made from.

    Attributes:
        q: queries (T, B, H, D).
        k: keys (S, B, H, D).
        p: position queries (T, B, H, P), or None for no positional term.
        e: position projections (T + S - 1, H, P), or (B, T + S - 1, H, P); None where p is.
    """

    q: Tensor
    k: Tensor
    p: Tensor | None
    e: Tensor | None

    def each(self, function: Callable[[Tensor], Tensor]) -> Scores:
        """The function of each of the four that there is."""
        return Scores(*(None if x is None else function(x) for x in self))

    def of_heads(self, heads: slice) -> Scores:
        """Those of some heads."""
        if heads == slice(None):
            return self
        by_head = (None if x is None else x[:, :, heads] for x in self[:3])
        return Scores(*by_head, None if self.e is None else self.e[..., heads, :])


class Masks(NamedTuple):
    """Which sources a target must not attend to: the union of all that is given.

    Attributes:
        key_padding_mask: bool (B, S), True for sources that no target may attend to; or None.
        attn_mask: bool (T, S) or (B, T, S), True where a target may not attend to a source; or None.
        chunk: frames per chunk; a target sees no later chunk. Zero or less: no chunks.
        left_chunks: how many chunks to its left a target sees; negative: all.
    """

    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    chunk: int = -1
    left_chunks: int = -1

    def dense(self) -> Masks:
        """With a contiguous padding mask."""
        padding = self.key_padding_mask
        return self if padding is None else self._replace(key_padding_mask=padding.contiguous())


class Penalty(NamedTuple):
    """The gradient of the scores s gains weight sign(s) where abs(s) > limit."""

    weight: float = 0.0
    limit: float = 0.0


class Use(NamedTuple):
    """What a use of weights, out = W values, leaves to the gradient of the scores.

    Attributes:
        heads: the heads of the weights that it uses.
        values: (S, B, heads, C).
        out: (T, B, heads, C).
        grad: the gradient of `out`.
    """

    heads: slice
    values: Tensor
    out: Tensor
    grad: Tensor


def is_whole(heads: slice, count: int) -> bool:
    """Whether these are all of so many heads."""
    return heads.indices(count) == (0, count, 1)


def by_heads(heads: int, uses: Sequence[Use]) -> list[tuple[slice, list[tuple[Tensor, Tensor, Tensor]]]]:
    """Cuts weights into runs of heads with the same uses.

    Args:
        heads: how many the weights have.
        uses: of any of these heads each.
    Returns:
        For each run its heads, and values, result and gradient of every use, of these heads.
    """
    ranges = [range(heads)[use.heads] for use in uses]
    cuts = sorted({0, heads, *[r.start for r in ranges], *[r.stop for r in ranges]})
    runs = []
    for first, last in pairwise(cuts):
        own = []
        for (_, values, out, grad), r in zip(uses, ranges, strict=True):
            if r.start <= first and last <= r.stop:
                wanted = slice(first - r.start, last - r.start)
                whole = len(r) == last - first
                own.append((values, out, grad) if whole else tuple(x[:, :, wanted] for x in (values, out, grad)))
        runs.append((slice(first, last), own))
    return runs


def grouped(count: int, args: Sequence[Any]) -> tuple[Scores, Sequence[Any], Masks, Penalty]:
    """The arguments of an op that begins with q, k, p, e, in groups.

    Args:
        count: how many tensors of its own the op takes before the masks.
        args: all arguments, in the order of the schema.
    Returns:
        The scores, the op's own tensors, the masks, and the penalty; none where the op takes none.
    """
    masks = 4 + count
    return Scores(*args[:4]), args[4:masks], Masks(*args[masks : masks + 4]), Penalty(*args[masks + 4 :])
