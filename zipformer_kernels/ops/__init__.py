"""The fused operations: one folder each, with a reference, its backends, and its cases."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

from zipformer_kernels.core.op import Op


def names() -> list[str]:
    """The names of all ops that are registered with torch."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]


def get(name: str) -> Op:
    """The op of a name. Raises ValueError naming the ops there are."""
    if name not in names():
        raise ValueError(f"op must be one of {', '.join(names())}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")._op


def explain(name: str, *args: Any, backend: str | None = None) -> str:
    """Says which backend a call of an op gets, and why each other one would not serve it.

    Args:
        name: the op, e.g. ``swoosh``.
        args: the op's arguments as its kernels take them; the first of the op's cases in float32 if there are none.
        backend: as a call would be given it.
    Raises:
        ValueError: there is no such op.
        BackendError: the backend asked for cannot serve the call.
    """
    op = get(name)
    return op.explain(*(args or example(name)), backend=backend)


def example(name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, ...]:
    """Arguments of an op's first case."""
    cases = importlib.import_module(f"{__name__}.{name}.cases").CASES
    return cases[0].inputs(dtype, device)
