"""What changed between two sets of results, beyond noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LEAST = 1.05
"""Two runs on one machine differ by a few percent from boot to boot, which no interval within a run can tell."""

LEAST_OF_FEW = 1.25
"""Below six samples there is no 95% interval of the median, and only what no machine does by chance counts."""
FEW = 6

Rows = dict[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """One row in both sets, or in one.

    Attributes:
        key: benchmark, case, direction, dtype, peer.
        verdict: ``regression``, ``improvement``, ``noise``, ``missing`` (in the first only) or ``new``.
        ratio: the second median over the first, where there are both.
    """

    key: tuple[str, ...]
    verdict: str
    ratio: float | None = None


def compare(first: Rows, second: Rows) -> list[Change]:
    """A verdict for every row of either set.

    A row is a regression if the 95% intervals of its medians do not overlap and the second median is at least 5%
    longer, 25% where either has fewer than six samples; an improvement likewise.
    """
    changes = [Change(key, "missing") for key in first if key not in second]
    changes += [Change(key, "new") for key in second if key not in first]
    for key, before in first.items():
        if key in second:
            changes.append(_change(key, before, second[key]))
    return changes


def _change(key: tuple[str, ...], before: dict[str, Any], after: dict[str, Any]) -> Change:
    (low_before, high_before), (low_after, high_after) = before["interval_s"], after["interval_s"]
    ratio = after["median_s"] / before["median_s"]
    least = LEAST_OF_FEW if min(len(before["samples_s"]), len(after["samples_s"])) < FEW else LEAST
    if low_after > high_before and ratio >= least:
        return Change(key, "regression", ratio)
    if high_after < low_before and 1 / ratio >= least:
        return Change(key, "improvement", ratio)
    return Change(key, "noise", ratio)
