"""How ScaledAdam's clipping has been doing, read from the device without making it wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zipformer_kernels.ops.scaled_adam import EARLY_ESTIMATES, Statistics


@dataclass(frozen=True)
class GroupDiagnostics:
    """What clipping has been doing in one parameter group.

    Attributes:
        steps: steps applied so far.
        skipped: steps skipped so far because a gradient norm was not finite.
        norm_quartiles: minimum, quartiles and maximum of the recorded gradient norms, at most the last
            `clipping_update_period`; None if none is recorded.
        threshold: the norm above which gradients are scaled down; infinite until first estimated.
        percent_clipped: percentage of steps clipped since the threshold was last estimated.
        dominant_name: the parameter that contributed most to the square of the last norm, or one that made it
            not finite; None if that norm is zero or unknown.
        dominant_proportion: its share of that square, from 0 to 1; NaN if the norm was not finite.
        dominant_rms: its root mean square, as last measured.
    """

    steps: int
    skipped: int
    norm_quartiles: tuple[float, float, float, float, float] | None
    threshold: float
    percent_clipped: float
    dominant_name: str | None
    dominant_proportion: float
    dominant_rms: float


class PendingDiagnostics:
    """Diagnostics on their way from the device, as `ScaledAdam.start_diagnostics` sends them."""

    def __init__(self, groups: list[tuple[Statistics, dict[str, Any]]]) -> None:
        self._numbers: list[Tensor] = []
        self._groups = [
            (len(statistics.norms), group["clipping_scale"] is not None, list(group["param_names"]))
            for statistics, group in groups
        ]
        self._arrivals: list[torch.cuda.Event] = []
        for statistics, _ in groups:
            numbers = _numbers(statistics)
            if numbers.is_cuda:
                with torch.cuda.device(numbers.device):
                    pinned = torch.empty_like(numbers, device="cpu", pin_memory=True)
                    numbers = pinned.copy_(numbers, non_blocking=True)
                    self._arrivals.append(torch.cuda.Event())
                    self._arrivals[-1].record()
            self._numbers.append(numbers)

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return all(event.query() for event in self._arrivals)

    def result(self) -> list[GroupDiagnostics]:
        """The diagnostics of each group, as they were when reading started. Waits for them to arrive."""
        for event in self._arrivals:
            event.synchronize()
        return [_diagnose(numbers.tolist(), *group) for numbers, group in zip(self._numbers, self._groups, strict=True)]


def _numbers(state: Statistics) -> Tensor:
    """What diagnostics are made of, in one tensor."""
    scalars = torch.stack([x.double() for x in (state.step, state.skipped, state.clipped, state.threshold)])
    return torch.cat([x.double() for x in (scalars, state.norms, state.contributions, state.rms)])


def _diagnose(read: list[float], period: int, clipping: bool, names: list[str]) -> GroupDiagnostics:
    steps, skipped, clipped, threshold = read[:4]
    norms, rest = read[4 : 4 + period], read[4 + period :]
    contributions, rms = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    recorded = 0 if not clipping else min(max(int(steps) - 1, 0), period)
    norms = sorted(norms)[period - recorded :]
    quartiles = tuple(norms[min(recorded - 1, recorded // 4 * n)] for n in range(5)) if recorded else None
    estimates = [t for t in EARLY_ESTIMATES if t < min(period, steps)]
    last_estimate = max([*estimates, (int(steps) - 1) // period * period])

    total = sum(contributions)
    weights = [x if math.isfinite(x) else math.inf for x in contributions]
    dominant = weights.index(max(weights))
    return GroupDiagnostics(
        steps=int(steps),
        skipped=int(skipped),
        norm_quartiles=quartiles,
        threshold=threshold,
        percent_clipped=100.0 * clipped / (steps - last_estimate) if steps else 0.0,
        dominant_name=names[dominant] if weights[dominant] > 0 else None,
        dominant_proportion=contributions[dominant] / total if total else math.nan,
        dominant_rms=rms[dominant],
    )
