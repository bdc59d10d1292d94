"""What a stage finds: rows, in a JSON file that is whole after every row, and a line of text for each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import environment


class Found:
    """Rows of one stage, with the environment they were found in.

    Args:
        path: the JSON file; written anew, and moved into place, at every row.
        stage: its name.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"stage": stage, "environment": environment(), "rows": []}

    def add(self, line: str, **row: Any) -> None:
        """Keeps a row and prints the line that says it."""
        self.content["rows"].append(row)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)
        print(line, flush=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was found so far."""
        return self.content["rows"]


def ends(main: Callable[[], int]) -> int:
    """The code of a stage's main function; an interrupt, which ends a stage that takes too long, is told in a line."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
