"""What is read off samples: medians, percentiles, and how far a median can be trusted. No distribution is assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


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
    ordered = sorted(samples)
    n = len(ordered)
    if not ordered:
        raise ValueError("samples: wanted at least one, got none")
    tail, k = 0.5**n, 1
    while k < (n + 1) // 2 and (tail := tail + math.comb(n, k) * 0.5**n) <= (1 - confidence) / 2:
        k += 1
    return ordered[k - 1], ordered[n - k]


def ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """How many times longer the others take: the median over the rounds in which both took their turn."""
    return median([other / mine for other, mine in zip(others, ours, strict=True)])
