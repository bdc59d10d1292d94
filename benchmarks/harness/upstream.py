"""Upstream, from the package `zipformer` on PyPI, without the heavy packages that its ``__init__`` imports.

``pip install --no-deps zipformer==0.1.3`` brings it. `load` imports its modules, unchanged, under a package of that
name that has nothing else in it, and beside a small stand-in for ``zipformer.utils``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
import sys
import types
from collections.abc import Iterator

import torch

SWITCH = "K2_ONNX_EXPORT"
"""Where this environment variable is 1 upstream's modules call their activations instead of compiling them."""


def load(*names: str) -> list[types.ModuleType]:
    """Upstream's modules of these names: ``scaling``, ``zipformer``, ``subsampling``, ``optim``.

    Raises:
        ImportError: the package is not installed.
    """
    if "zipformer" not in sys.modules:
        _register()
    return [importlib.import_module(f"zipformer.modules.{name}") for name in names]


def unavailable() -> str | None:
    """Why upstream cannot be run here, or None if it can."""
    if "zipformer" in sys.modules or importlib.util.find_spec("zipformer") is not None:
        return None
    return "upstream is not installed: pip install --no-deps zipformer==0.1.3"


@contextlib.contextmanager
def activations(compiled: bool) -> Iterator[None]:
    """Modules built within the block hand their activations to torch.compile, as upstream ships them, or call them."""
    previous = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0" if compiled else "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = previous


def _register() -> None:
    reason = unavailable()
    if reason is not None:
        raise ImportError(reason)
    spec = importlib.util.find_spec("zipformer")
    package = types.ModuleType("zipformer")
    package.__path__ = list(spec.submodule_search_locations)
    utils = types.ModuleType("zipformer.utils")
    utils.torch_autocast = lambda device_type="cuda", **kwargs: torch.amp.autocast(device_type, **kwargs)
    utils.fix_random_seed = _fix_random_seed
    sys.modules["zipformer"] = package
    sys.modules["zipformer.utils"] = utils


def _fix_random_seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
