"""Results files: one JSON file per benchmark, with the environment, the rows and their raw samples."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.harness.job import Measured
from benchmarks.harness.machine import ROOT, device_name, slug

FORMAT = "zipformer-kernels benchmark 1"
KEY = ("benchmark", "case", "direction", "dtype", "peer")


class ResultsError(ValueError):
    """A file of results cannot be read or written."""


def default_folder() -> Path:
    """Where results go: into the checkout, in a folder named after the device; outside of one, beside the user."""
    folder = ROOT / "benchmarks" / "results"
    return (folder if folder.is_dir() else Path("benchmark-results")) / slug(device_name())


def check_folder(path: Path) -> None:
    """Raises `ResultsError` where no results can be written to a folder: before the work, not after it."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ResultsError(f"{path}: wanted a folder, and {there} is a file")
    if not os.access(there, os.W_OK):
        raise ResultsError(f"{path}: the folder {there} is not writable")


def content(benchmark: str, environment: dict[str, Any], rates: dict[str, Any], found: Measured) -> dict[str, Any]:
    """What a results file holds."""
    head = {"format": FORMAT, "benchmark": benchmark, "environment": environment, "rates": rates}
    profile = {"profile": found.profile} if found.profile else {}
    return head | {"rows": found.rows, **profile, "skipped": [*found.skipped, *found.failed], "wrong": found.wrong}


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes a results file, all at once: whoever reads it finds the old one or the new one, whole.

    Raises:
        ResultsError: it cannot be written.
    """
    beside = path.with_suffix(".json.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(dumps(results))
        os.replace(beside, path)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written: {error.strerror or error}") from error


def dumps(results: dict[str, Any]) -> str:
    """JSON with a row's samples on one line."""
    text = {
        str(i): json.dumps([float(f"{sample:.6g}") for sample in row["samples_s"]])
        for i, row in enumerate(results["rows"])
    }
    rows = [row | {"samples_s": f"@{i}@"} for i, row in enumerate(results["rows"])]
    laid_out = json.dumps(results | {"rows": rows}, indent=1)
    for i, samples in text.items():
        laid_out = laid_out.replace(f'"@{i}@"', samples)
    return laid_out + "\n"


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ResultsError: there is none, or it is not one of ours.
    """
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultsError(f"{path}: is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or not _whole(results.get("rows")):
        raise ResultsError(f"{path}: is not a results file of this version: wanted the format {FORMAT!r}")
    return results


def _whole(rows: Any) -> bool:
    """Whether these are rows that can be compared."""
    wanted = {*KEY, "median_s", "interval_s", "samples_s"}
    return isinstance(rows, list) and all(isinstance(row, dict) and wanted <= set(row) for row in rows)


def read_rows(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a results file, or of all in a folder, by what they measure. Raises `ResultsError`."""
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        raise ResultsError(f"{path}: holds no results files")
    return {tuple(row[name] for name in KEY): row for path in paths for row in read(path)["rows"]}
