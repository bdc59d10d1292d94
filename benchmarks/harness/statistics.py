"""What is read off samples: medians, percentiles, and how far a median can be trusted. No distribution is assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist

CONFIDENCE = 0.95

EXACT = 2000
"""Up to so many samples the interval of a median is counted out; it takes some milliseconds."""


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` of the samples lie, interpolated between neighbours.

    Args:
        samples: at least one number.
        share: from 0 to 1.
    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("samples: wanted at least one, got none")
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median(samples: Sequence[float]) -> float:
    """The middle of the samples. Raises ValueError where there are none."""
    return percentile(samples, 0.5)


def spread(samples: Sequence[float]) -> float:
    """The distance between the quartiles."""
    return percentile(samples, 0.75) - percentile(samples, 0.25)


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval that holds the true median with at least this confidence, if there are samples enough for it.

    Its ends are the k-th smallest and k-th largest sample, with the largest k for which fewer than k of n fair coins
    show heads with probability at most (1 - confidence) / 2. Below six samples at 95% no k will do, and the interval is
    from the smallest to the largest.
    """
    if not samples:
        raise ValueError("samples: wanted at least one, got none")
    ordered, k = sorted(samples), interval_rank(len(samples), confidence)
    return ordered[k - 1], ordered[len(ordered) - k]


def interval_rank(n: int, confidence: float = CONFIDENCE) -> int:
    """The k of `median_interval`: exact, in whole numbers, up to `EXACT` samples, and by the normal law beyond.

    The normal law gives the same k or, rarely, one less, which widens the interval by a sample at either end.
    """
    tail = (1 - confidence) / 2
    if n > EXACT:
        return max(1, math.floor(0.5 * (n + 1) - 0.5 * math.sqrt(n) * NormalDist().inv_cdf(1 - tail)))
    limit = Fraction(tail) * 2**n
    ways, below, k = 1, 1, 1  # of k coins, and of fewer than k + 1
    while k < (n + 1) // 2:
        ways = ways * (n - k + 1) // k
        below += ways
        if below > limit:
            break
        k += 1
    return k


def ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """How many times longer the others take: the median over the rounds in which both took their turn."""
    return median([other / mine for other, mine in zip(others, ours, strict=True)])
