"""Writes docs/api.md from the docstrings of everything public. ``tests/test_api_page.py`` holds that it is current."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "api.md"
PACKAGES = ("zipformer_kernels", "zipformer_kernels.optim", "zipformer_kernels.training")
ROOMS = {
    "convert": "Converting a model",
    "checkpoint": "Loading a checkpoint",
    "core": "Choosing a backend",
    "ops": "Ops",
    "modules": "Modules",
    "graphs": "CUDA graphs",
    "optim": "Optimizer and schedules",
    "training": "Training",
}
OTHER = "training"
LISTS = ("Args", "Attributes", "Raises")
TEXTS = ("Returns", "Yields")
HEAD = "# API\n\nWritten by `make docs` from the docstrings. To change a line, change it there."


class Bare(str):
    """An annotation that a signature shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def page() -> str:
    """The whole page: what is public, by the room it lives in."""
    rooms: dict[str, dict[str, Any]] = {room: {} for room in ROOMS}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in sorted(module.__all__, key=str.lower):
            one = getattr(module, name)
            if ours(one) and not any(name in found for found in rooms.values()):
                room = one.__module__.split(".")[1]
                rooms[room if room in ROOMS else OTHER][name] = (package, one)
    contents, parts = [], []
    for room, found in rooms.items():
        contents.append(f"- {ROOMS[room]}: " + ", ".join(f"[{name}](#{name.lower()})" for name in found))
        parts += [f"## {ROOMS[room]}", *(section(name, *where) for name, where in found.items())]
    return "\n\n".join([HEAD, "\n".join(contents), *parts]) + "\n"


def ours(one: Any) -> bool:
    """Whether it is a class or a function of this package: not a constant, and nothing that torch has."""
    return (inspect.isclass(one) or inspect.isroutine(one)) and one.__module__.startswith("zipformer_kernels")


def section(name: str, package: str, one: Any) -> str:
    """A class with its methods, or a function."""
    if one.__name__ != name:
        return f"### {name}\n\nAnother name of [{one.__name__}](#{one.__name__.lower()})."
    parts = [f"### {name}", signature(f"{package}.{name}", one), text(one.__doc__)]
    if inspect.isclass(one):
        for key, member in vars(one).items():
            function = getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isroutine(function) and function.__doc__:
                parts += [f"#### {name}.{key}", signature(key, getattr(one, key)), text(function.__doc__)]
    return "\n\n".join(part for part in parts if part)


def signature(name: str, one: Any) -> str:
    """How it is called, one argument a line where one line would be too long. Nothing for exceptions."""
    if inspect.isclass(one) and issubclass(one, BaseException):
        return ""
    found = inspect.signature(one)
    arguments = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(a.startswith("*") for a in arguments):
            arguments.append("*")
        if parameter.name != "self":
            arguments.append(str(parameter.replace(annotation=written(parameter.annotation))))
    returned = "" if inspect.isclass(one) or found.return_annotation is found.empty else found.return_annotation
    end = f") -> {returned}" if returned else ")"
    line = f"{name}({', '.join(arguments)}{end}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), end])
    return f"```python\n{line}\n```"


def written(annotation: Any) -> Any:
    """An annotation as it is written, without quotes."""
    return Bare(annotation) if isinstance(annotation, str) else annotation


def text(docstring: str | None) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    kind = ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        heading = line.rstrip(":")
        if line.endswith(":") and heading in (*LISTS, *TEXTS):
            kind = heading
            lines += ["", f"**{heading}**", ""]
        elif kind in LISTS and re.match(r" {4}\S", line):
            lines.append(f"- {escaped(line.strip())}")
        elif kind and line.startswith("    "):
            lines.append(f"  {escaped(line.strip())}" if kind in LISTS else escaped(line.strip()))
        else:
            kind = kind if not line else ""
            lines.append(line if line.startswith("    ") else escaped(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def escaped(line: str) -> str:
    """A line whose stars and angles mean themselves, but within backticks."""
    pieces = re.split(r"(`+[^`]+`+)", line)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<])", r"\\\1", piece) for piece in pieces)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.name)
