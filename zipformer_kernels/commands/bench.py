"""``zipformer-kernels bench``: says where the benchmarks are."""

from __future__ import annotations


class MovedError(RuntimeError):
    """A command is found elsewhere; the message says where."""


def bench() -> None:
    """Moved: run python -m benchmarks.harness in a checkout."""
    raise MovedError("bench: the benchmarks left the package: run python -m benchmarks.harness in a checkout")
