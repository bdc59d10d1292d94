"""Digests of what the methods of a class do, from their source, with the helpers, constants and bases that they use.

``python -m zipformer_kernels.convert FILE ...`` prints those of the classes in files, for the table in `known`.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import linecache
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from zipformer_kernels.convert.canonical import FunctionNode, canonical

# What is not run when a module is called: how it was made lies in its attributes, which are looked at themselves.
NOT_RUN = {"__init__", "__repr__", "__str__", "extra_repr", "__init_subclass__"}
LIBRARIES = {"torch", "numpy", "k2", *sys.stdlib_module_names}  # known by their names, not by their source
BY_NAME = {"torch_autocast", "custom_fwd", "custom_bwd"}  # helpers that pass on to torch, otherwise in every version
DIGITS = 12


class NoSource(Exception):
    """The source of something that a method runs cannot be had, or is not that of the function that runs."""


class Digests:
    """The digests of what modules run. It reads every class once, so it is made anew where a class may have changed."""

    def __init__(self) -> None:
        self._methods = functools.cache(methods)
        self._held = functools.cache(_held)

    def of(self, module: nn.Module) -> dict[str, str | None]:
        """By name: those of its class's methods, and of what it holds that is no module.

        The latter are functions, and objects of classes that have a source, in its attributes. A digest is None where a
        source cannot be had.
        """
        found = dict(self._methods(type(module)))
        for name, value in vars(module).items():
            if _plain(value) is not None:
                found[name] = self._held(value)
            elif _library(type(value)) is None and not isinstance(value, nn.Module):
                found[name] = self._held(type(value))
        return found


def _held(value: types.FunctionType | type) -> str | None:
    reader = _Reader(None)
    return _try(lambda: reader.whole(value) if isinstance(value, type) else reader.function(value))


def methods(cls: type[nn.Module]) -> dict[str, str | None]:
    """The digest of every method of a module's class that callers may call, by name.

    They are the public methods, and those that replace one of Python's or of `nn.Module`'s. Private ones count where
    they are called.
    """
    found: dict[str, str | None] = {}
    for name, definer, value in _functions(cls):
        if name not in found and name not in NOT_RUN and not _private(name):
            found[name] = _try(lambda v=value, d=definer: _Reader(cls).method(v, d))
    return found


def _try(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except NoSource:
        return None


def _private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and not hasattr(nn.Module, name)


def _functions(cls: type) -> Iterator[tuple[str, type, Any]]:
    """(name, class that defines it, what it defines) of all functions, those first that are found first."""
    for base in cls.__mro__:
        if _library(base) is None and base is not object:
            yield from ((n, base, v) for n, v in vars(base).items() if _plain(v) is not None or isinstance(v, property))


def _plain(value: Any) -> types.FunctionType | None:
    """The Python function that a class's attribute, or a wrapper of torch's around it, runs."""
    value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    while isinstance(value, types.FunctionType) and hasattr(value, "__wrapped__") and _library(value) is not None:
        value = value.__wrapped__
    return value if isinstance(value, types.FunctionType) else None


def _library(value: Any) -> str | None:
    """The library that an object is of, or None if it is to be known by its source."""
    globals_ = getattr(value, "__globals__", None)  # a wrapper bears the name of what it wraps, but its own globals
    module = getattr(value, "__module__", None) if globals_ is None else globals_.get("__name__")
    top = (module or "").partition(".")[0]
    return top if top in LIBRARIES or module is None else None


class _Reader:
    """Writes out one class's functions. What is being read already, in a recursion, is written by its name."""

    def __init__(self, cls: type | None, reading: frozenset[Any] = frozenset()) -> None:
        self.cls = cls
        self.reading = reading

    def method(self, value: Any, definer: type) -> str:
        """The digest of one attribute of a class: a function, static or class method, or property."""
        if isinstance(value, property):
            parts = [self.function(f, definer) for f in (value.fget, value.fset) if f is not None]
            return _hash("property", *parts)
        kind = type(value).__name__ if isinstance(value, staticmethod | classmethod) else ""
        return _hash(kind, self.function(value, definer))

    def function(self, value: Any, definer: type | None = None) -> str:
        function = _plain(value)
        if function is None:
            raise NoSource
        if function in self.reading:
            return f"again:{function.__name__}"
        node = _definition(function)
        inner = _Reader(self.cls, self.reading | {function})
        owner = node.args.args[0].arg if definer and node.args.args and not isinstance(value, staticmethod) else None
        text = canonical(node, lambda path: inner.resolve(path, function), owner)
        above = [inner.above(name, definer) for name in re.findall(r"super\(\)\.(\w+)", text)]
        return _hash(text, *filter(None, above))

    def resolve(self, path: list[str], function: types.FunctionType) -> tuple[str, int]:
        """What to write for a dotted name in a function, and how many of its parts that covers."""
        if path[0] == "self":
            found = self.attribute(path[1]) if len(path) > 1 else None
            return ("self", 1) if found is None else (found, 2)
        closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if path[0] in closed:
            value = closed[path[0]].cell_contents
        elif path[0] in function.__globals__:
            value = function.__globals__[path[0]]
        else:
            if path[0] in LIBRARIES:  # it is not installed, and asked for only where it is
                return f"{path[0]}:{path[-1]}", len(path)
            return (path[0], 1) if hasattr(builtins, path[0]) else (f"?{path[0]}", 1)
        covered = 1
        while isinstance(value, types.ModuleType) and covered < len(path):
            if value.__name__.partition(".")[0] in LIBRARIES:
                return f"{value.__name__.partition('.')[0]}:{path[-1]}", len(path)
            if path[covered] in BY_NAME:
                return path[covered], covered + 1
            value, covered = getattr(value, path[covered], None), covered + 1
        return (path[0] if path[0] in BY_NAME else self.value(value)), covered

    def attribute(self, name: str) -> str | None:
        """What stands for ``self.name``: a private method's digest or a constant; None for what is known by name."""
        for base in self.cls.__mro__ if self.cls else ():
            if _library(base) is not None or base is object or name not in vars(base):
                continue
            value = vars(base)[name]
            if _plain(value) is not None or isinstance(value, property):
                return self.method(value, base) if _private(name) else None
            return self.value(value)
        return None

    def above(self, name: str, definer: type | None) -> str | None:
        """The digest of what ``super().name`` finds."""
        mro = self.cls.__mro__ if self.cls else ()
        later = mro[mro.index(definer) + 1 :] if definer in mro else ()
        for base in later:
            if _library(base) is not None:
                return None
            if name in vars(base):
                return self.method(vars(base)[name], base)
        return None

    def value(self, value: Any) -> str:
        """What stands for an object that a function finds by a global name."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return repr(value)
        if isinstance(value, tuple | list):
            return f"{type(value).__name__}({','.join(map(self.value, value))})"
        if isinstance(value, dict):
            return f"dict({','.join(f'{self.value(k)}:{self.value(v)}' for k, v in value.items())})"
        if isinstance(value, types.ModuleType):
            return f"module:{value.__name__}"
        library = _library(value) if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) else None
        if library is not None:
            return f"{library}:{value.__name__}"
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, type):
            return self.whole(value)
        return f"object:{type(value).__module__.partition('.')[0]}:{type(value).__name__}"

    def whole(self, cls: type) -> str:
        """The digest of everything that a class runs."""
        if cls in self.reading:
            return f"again:{cls.__name__}"
        inner = _Reader(cls, self.reading | {cls})
        done: dict[str, str] = {}
        for name, definer, value in _functions(cls):
            if name not in done and name not in NOT_RUN - ({"__init__"} if not issubclass(cls, nn.Module) else set()):
                done[name] = inner.method(value, definer)
        return _hash(*(f"{name}={digest}" for name, digest in sorted(done.items())))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:DIGITS]


def _definition(function: types.FunctionType) -> FunctionNode:
    """The syntax tree of a function, from its file, if what the file says is what the function runs."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    found = _read("".join(lines), code.co_filename).get((code.co_firstlineno, code.co_name))
    if found is None or found[1] != code:
        raise NoSource
    return found[0]


@functools.lru_cache(maxsize=64)
def _read(text: str, filename: str) -> dict[tuple[int, str], tuple[FunctionNode, types.CodeType]]:
    """Syntax tree and code of every function in a file, by first line and name."""
    try:
        tree = ast.parse(text)
        code = compile(tree, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    codes = {(inner.co_firstlineno, inner.co_name): inner for inner in _codes(code)}
    result = {}
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode):
            line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (line, node.name) in codes:
                result[line, node.name] = node, codes[line, node.name]
    return result


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield inner
            yield from _codes(inner)
