"""``python -m benchmarks.harness``: measure this machine, or compare two measurements."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from benchmarks.harness import process, results, suite, tables
from benchmarks.harness.compare import compare
from benchmarks.harness.job import Measured
from benchmarks.harness.peers import OURS
from zipformer_kernels import cli

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def measure_or_compare(
    benchmarks: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help=f"Any of {', '.join(suite.names())}; default: all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the JSON files and plots; by default named after the device.")
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--every", help="All sizes, awkward ones too, up to an hour of audio: takes hours."),
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compiled/--no-compiled", help="Peers that go through torch.compile, minutes each on a GPU."),
    ] = True,
    compared: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Measure nothing: name what is slower in B (files or folders)."),
    ] = None,
) -> None:
    """Measure ops and models beside the reference, torch.compile and upstream; or compare two measurements."""
    if compared is not None:
        if benchmarks:
            raise results.ResultsError(f"--compare: takes two files and no benchmarks, got {', '.join(benchmarks)}")
        raise typer.Exit(report_changes(*compared))
    wanted = benchmarks or suite.names()
    for name in wanted:
        if name not in suite.names():
            raise results.ResultsError(f"OP: wanted any of {', '.join(suite.names())}, got {name!r}")
    folder = output or results.default_folder()
    results.check_folder(folder)
    raise typer.Exit(measure(suite.steps(wanted, every, compiled), folder))


def wide_console() -> Console:
    """A console of at least 100 columns, which the tables need."""
    console = Console()
    console.width = max(console.width, 100)
    return console


def report_changes(first: Path, second: Path) -> int:
    """Prints what changed; 1 if something got slower, else 0."""
    changes = compare(results.read_rows(first), results.read_rows(second))
    console = wide_console()
    slower = sum(change.verdict == "regression" for change in changes)
    noise = sum(change.verdict == "noise" for change in changes)
    if noise < len(changes):
        console.print(tables.changes_table(changes))
    console.print(f"{slower} slower beyond noise, {noise} of {len(changes)} unchanged")
    return int(slower > 0)


def measure(planned: Sequence[suite.Step], folder: Path) -> int:
    """Runs benchmarks, prints their tables and writes files.

    Returns:
        1 if a peer's results were wrong, or one of ours failed, else 0.
    """
    process.quieten()
    console = wide_console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(planned))

        def on_step(step: suite.Step, found: Measured) -> None:
            progress.advance(task)
            console.print(tables.job_table(step.job, found))

        found = Measured()
        for gave in suite.run(planned, folder, on_step).values():
            found.add(gave)
    lines = {f"no {row['peer']}: {row['reason']}": None for row in sorted(found.skipped, key=itemgetter("peer"))}
    for kind in ("failed", "wrong"):
        for row in getattr(found, kind):
            work = f"{row['benchmark']}, {row['case']}, {row['direction']}"
            lines[f"{kind}: {work}: {row['peer']}: {row['reason']}"] = None
    for line in lines:
        console.print(Text(line))
    draw(folder, console)
    console.print(f"saved to {folder}", soft_wrap=True)
    return int(bool(found.wrong) or any(row["peer"] in OURS for row in found.failed))


def draw(folder: Path, console: Console) -> None:
    """Plots all that lies in a folder of results, where matplotlib is installed."""
    try:
        from benchmarks.harness.plots import plot_all
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        console.print("no plots: matplotlib is not installed")
        return
    plot_all([results.read(path) for path in sorted(folder.glob("*.json"))], folder)


def main(arguments: list[str]) -> NoReturn:
    """Runs the command line; exits with code 2 and one line on stderr where the user's input is at fault."""
    cli.serve(app, arguments, "python -m benchmarks.harness", (results.ResultsError,))


if __name__ == "__main__":
    main(sys.argv[1:])
