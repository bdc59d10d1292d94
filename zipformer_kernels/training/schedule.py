"""Numbers that change with the batch count: dropout rates, limits and probabilities on a schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable

from zipformer_kernels.core.module import Module
from zipformer_kernels.training.randomness import logging_draw

logger = logging.getLogger(__name__)


class PiecewiseLinear:
    """A continuous piecewise-linear function of one number, constant beyond its first and last knots.

    Args:
        *pairs: knots (x, y), x strictly increasing; or one PiecewiseLinear, which is copied.

    Raises:
        ValueError: there is no knot, or the x values do not increase.
    """

    def __init__(self, *pairs: tuple[float, float] | PiecewiseLinear) -> None:
        if len(pairs) == 1 and isinstance(pairs[0], PiecewiseLinear):
            self.pairs = list(pairs[0].pairs)
            return
        self.pairs = [(float(x), float(y)) for x, y in pairs]
        if not self.pairs:
            raise ValueError("pairs: a schedule needs at least one knot (x, y), got none")
        if any(here >= there for (here, _), (there, _) in zip(self.pairs, self.pairs[1:], strict=False)):
            raise ValueError(f"pairs: x values must strictly increase, got {self.pairs}")

    def __repr__(self) -> str:
        return f"PiecewiseLinear({', '.join(map(str, self.pairs))})"

    def __call__(self, x: float) -> float:
        first, last = self.pairs[0], self.pairs[-1]
        if x <= first[0]:
            return first[1]
        if x >= last[0]:
            return last[1]
        segments = zip(self.pairs, self.pairs[1:], strict=False)
        (x0, y0), (x1, y1) = next((here, there) for here, there in segments if x <= there[0])
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    def __mul__(self, factor: float) -> PiecewiseLinear:
        return PiecewiseLinear(*((x, y * factor) for x, y in self.pairs))

    def __add__(self, other: float | PiecewiseLinear) -> PiecewiseLinear:
        if not isinstance(other, PiecewiseLinear):
            return PiecewiseLinear(*((x, y + other) for x, y in self.pairs))
        return self._combine(other, lambda a, b: a + b)

    def max(self, other: float | PiecewiseLinear) -> PiecewiseLinear:
        """The pointwise maximum, with a knot wherever the two functions cross."""
        return self._combine(other, max, include_crossings=True)

    def min(self, other: float | PiecewiseLinear) -> PiecewiseLinear:
        """The pointwise minimum, with a knot wherever the two functions cross."""
        return self._combine(other, min, include_crossings=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PiecewiseLinear) and self.pairs == other.pairs

    def __hash__(self) -> int:
        return hash(tuple(self.pairs))

    def get_common_basis(
        self, other: PiecewiseLinear, include_crossings: bool = False
    ) -> tuple[PiecewiseLinear, PiecewiseLinear]:
        """The same two functions, written over the union of their knots.

        Args:
            other: the second function.
            include_crossings: add a knot at each point where the two functions cross.
        """
        xs = sorted({x for x, _ in self.pairs + other.pairs})
        if include_crossings:
            gaps = [self(x) - other(x) for x in xs]
            crossings = [
                x0 + abs(gap0) / (abs(gap0) + abs(gap1)) * (x1 - x0)
                for x0, x1, gap0, gap1 in zip(xs, xs[1:], gaps, gaps[1:], strict=False)
                if (gap0 > 0) != (gap1 > 0)
            ]
            xs = sorted({*xs, *crossings})
        return PiecewiseLinear(*((x, self(x)) for x in xs)), PiecewiseLinear(*((x, other(x)) for x in xs))

    def _combine(
        self,
        other: float | PiecewiseLinear,
        operation: Callable[[float, float], float],
        include_crossings: bool = False,
    ) -> PiecewiseLinear:
        if not isinstance(other, PiecewiseLinear):
            other = PiecewiseLinear((0.0, other))
        ours, theirs = self.get_common_basis(other, include_crossings)
        return PiecewiseLinear(*((x, operation(a, b)) for (x, a), (_, b) in zip(ours.pairs, theirs.pairs, strict=True)))


class ScheduledFloat(Module):
    """A number that follows a schedule over the training's batch count; read it with ``float(...)``.

    It is a module only to be found by ``model.modules()``: the training loop writes `batch_count` (and, for
    logs, `name`) into every module that has such an attribute. It has no parameters and no forward.

    Args:
        *args: knots (batch count, value), as for `PiecewiseLinear`.
        default: the value in eval mode, and in training mode as long as `batch_count` is None.
    """

    def __init__(self, *args: tuple[float, float] | PiecewiseLinear, default: float = 0.0) -> None:
        super().__init__()
        self.batch_count: float | None = None
        self.name: str | None = None
        self.default = default
        self.schedule = PiecewiseLinear(*args)

    def extra_repr(self) -> str:
        return f"batch_count={self.batch_count}, schedule={self.schedule.pairs}, default={self.default}"

    def __float__(self) -> float:
        if self.batch_count is None or not self.training:
            return float(self.default)
        value = self.schedule(self.batch_count)
        if logging_draw(0.0002):
            logger.debug("ScheduledFloat %s: %s at batch %s", self.name, value, self.batch_count)
        return value

    def __add__(self, other: FloatLike) -> ScheduledFloat:
        schedule, default = _parts(other)
        return ScheduledFloat(self.schedule + schedule, default=self.default + default)

    def max(self, other: FloatLike) -> ScheduledFloat:
        """The schedule that is the larger of the two at every batch.

        As upstream has it, the maximum with a plain number keeps this schedule's own default.
        """
        schedule, default = _parts(other)
        default = max(self.default, default) if isinstance(other, ScheduledFloat) else self.default
        return ScheduledFloat(self.schedule.max(schedule), default=default)


FloatLike = float | ScheduledFloat


def _parts(value: FloatLike) -> tuple[float | PiecewiseLinear, float]:
    """The schedule and the default of a number; as upstream has it, a plain number leaves defaults alone."""
    return (value.schedule, value.default) if isinstance(value, ScheduledFloat) else (value, 0.0)
