"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def table(head: str | list[str], lines: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; `head` names the columns, as a list or separated by commas."""
    columns = head.split(", ") if isinstance(head, str) else head
    body = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body])
