"""The fused operations: one folder each, with a reference, its backends, and its cases.

An op's variant is named with the op: ``conv_module.stream`` is the variant ``stream`` of ``conv_module``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

from zipformer_kernels.core.op import Op
from zipformer_kernels.ops.cases import Case


def names() -> list[str]:
    """The names of all ops, without their variants."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]


def variant_names(name: str) -> list[str]:
    """The full names of the variants of an op, such as ``conv_module.stream``. Raises as `get`."""
    return [f"{name}.{variant}" for variant in get(name).variants]


def get(name: str) -> Op:
    """The op, or the variant of an op, of a name.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    op, _, variant = name.partition(".")
    if op not in names():
        raise ValueError(f"op must be one of {', '.join(names())}, got {op!r}")
    found = importlib.import_module(f"{__name__}.{op}")._op
    if op == name:
        return found
    if variant not in found.variants:
        variants = ", ".join(found.variants) or "none"
        raise ValueError(f"variant of {op} must be one of {variants}, got {variant!r}")
    return found.variants[variant]


def cases_of(name: str) -> list[Case]:
    """The cases of an op or of a variant. Raises ValueError as `get`."""
    get(name)
    op, _, variant = name.partition(".")
    module = importlib.import_module(f"{__name__}.{op}.cases")
    return module.VARIANT_CASES[variant] if variant else module.CASES


def explain(name: str, *args: Any, backend: str | None = None) -> str:
    """Says which backend a call of an op gets, why each other one would not serve it, and which variants it has.

    Args:
        name: the op, e.g. ``swoosh``, or a variant, e.g. ``conv_module.stream``.
        args: the op's arguments as its kernels take them; the first of the op's cases in float32 if there are none.
        backend: as a call would be given it.
    Raises:
        ValueError: there is no such op.
        BackendError: the backend asked for cannot serve the call.
    """
    op = get(name)
    return op.explain(*(args or example(name)), backend=backend)


def example(name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, ...]:
    """Arguments of the first case of an op or of a variant."""
    return cases_of(name)[0].inputs(dtype, device)
