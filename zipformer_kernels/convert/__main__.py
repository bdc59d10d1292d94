"""Prints the digests of the classes in a recipe's files, and which are known: ``python -m zipformer_kernels.convert``.

The files are imported, with empty modules for what they import and is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from torch import nn

from zipformer_kernels.convert.digest import methods
from zipformer_kernels.convert.known import KNOWN


class _Stub(types.ModuleType):
    """A module in which every name is an empty class, or a class of modules."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {"__module__": self.__name__})


def imported(path: Path) -> types.ModuleType:
    """The module that a file holds. What it imports is found in its own folder first."""
    sys.path.insert(0, str(path.parent))
    stubs: list[str] = []
    try:
        while True:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except ModuleNotFoundError as error:
                if error.name in stubs:
                    raise
                stubs.append(error.name)
                sys.modules[error.name] = _Stub(error.name)
                continue
            return module
    finally:
        sys.path.remove(str(path.parent))
        for name in [*stubs, *(p.stem for p in path.parent.glob("*.py"))]:
            sys.modules.pop(name, None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m zipformer_kernels.convert", description=__doc__.split(":")[0])
    parser.add_argument("files", nargs="+", type=Path, help="such as zipformer.py, scaling.py, subsampling.py")
    for path in parser.parse_args(arguments).files:
        module = imported(path.resolve())
        for cls in vars(module).values():
            if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__):
                continue
            for method, digest in methods(cls).items():
                rows = [row for row, known in KNOWN.items() if digest in known.get(method, ())]
                print(path, cls.__name__, method, digest or "no source", "known" if rows else "unknown", *rows)


if __name__ == "__main__":
    main()
