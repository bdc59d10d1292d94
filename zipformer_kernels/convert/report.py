"""What `convert` and `revert` tell about what they did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What `convert` or `revert` did. ``print`` it for a summary.

    Attributes:
        swapped: (path, class name) of each module swapped; the path as in `named_modules`, "" for the model.
        not_swapped: (path, class name, reason) of each module that could have been swapped but was left as it was.
        layers: how many of the model's encoder layers are ours now, and how many it has.
        check: what the comparison on a batch found; empty where none was asked for.
    """

    swapped: list[tuple[str, str]] = field(default_factory=list)
    not_swapped: list[tuple[str, str, str]] = field(default_factory=list)
    layers: tuple[int, int] = (0, 0)
    check: str = ""

    @property
    def kept(self) -> list[tuple[str, str, str]]:
        """`not_swapped`, by its name before version 0.2, which callers have in their code."""
        return self.not_swapped

    def __str__(self) -> str:
        counts = Counter(name for _, name in self.swapped)
        lines = [f"swapped: {len(self.swapped)}"]
        lines += [f"  {count:5} {name}" for name, count in sorted(counts.items())]
        lines += [f"not swapped: {len(self.not_swapped)}"]
        alike: dict[tuple[str, str], list[str]] = {}
        for path, name, reason in self.not_swapped:
            alike.setdefault((name, reason), []).append(path or "(the model)")
        for (name, reason), paths in alike.items():
            lines += [f"  {name}: {reason}", *(f"      {path}" for path in paths)]
        lines += [f"check: {self.check}"] if self.check else []
        ours, all_layers = self.layers
        return "\n".join([*lines, f"{ours} of {all_layers} encoder layers are ours"])
