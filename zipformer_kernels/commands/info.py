"""``zipformer-kernels info``: what is installed, what was built, and which backend each op runs on."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
from importlib import resources
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zipformer_kernels import ops
from zipformer_kernels.core import backend, tuning


def info(
    tuned: Annotated[
        bool, typer.Option("--tuning", help="Show thresholds and tile sizes instead, and where each comes from.")
    ] = False,
) -> None:
    """Show versions, what was built, and which backend each op gets, with reasons."""
    console = Console()
    if tuned:
        console.print(tuning_list(), soft_wrap=True, end="")
        return
    for title, rows in (("Versions", versions()), ("Device", device()), ("Build", build())):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in rows.items():
            table.add_row(name, Text(value))
        console.print(table, "")
    console.print(ops_table())
    for name, reason in backend.missing.items():
        if reason is not None:
            console.print(Text(f"no {name}: {reason}"))


def versions() -> dict[str, str]:
    """Versions of this package and of what it runs on."""
    rows = {name: _version(name) for name in ("zipformer-kernels", "torch", "triton", "numpy")}
    return rows | {"python": platform.python_version(), "system": platform.platform()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device() -> dict[str, str]:
    """The processor, as the compiled module sees it, and the GPUs, as torch does."""
    isa = backend.native.detected_isa() if backend.native else "unknown: the compiled module was not built"
    rows = {
        "processor": platform.machine(),
        "instruction set": isa,
        "threads": str(torch.get_num_threads()),
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows[f"GPU {i}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return rows if torch.cuda.device_count() else rows | {"GPU": "torch sees none"}


def build() -> dict[str, str]:
    """What was compiled when the package was installed, and why not the rest."""
    rows = {}
    record = resources.files("zipformer_kernels").joinpath("_build.json")
    if record.is_file():  # not there where the sources were never installed
        content = json.loads(record.read_text())
        rows["ZIPFORMER_KERNELS_BUILD"] = content["requested"]
        for name, reason in content["not_built"].items():
            rows[f"{name} kernels"] = "built" if reason is None else f"not built: {reason}"
    if backend.native is not None:
        rows["compiler"] = backend.native.build["compiler"]
        rows["CUDA targets"] = backend.native.build["cuda_targets"] or "none"
    rows["ZIPFORMER_KERNELS_BACKEND"] = backend.requested()
    return rows


def ops_table() -> Table:
    """Ops and variants by backends: what a float32 call on this machine's best device gets, and what is missing."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table("op", *backend.BACKENDS, title=f"Ops on {where} tensors, float32", title_justify="left")
    for name in ops.names():
        if not hasattr(importlib.import_module(f"{ops.__name__}.{name}"), "_op"):
            table.add_row(name, Text("auto", style="bold green"), Text("plain PyTorch so far", style="dim"))
            continue
        for full_name in (name, *ops.variant_names(name)):
            table.add_row(full_name, *_cells(full_name, where))
    return table


def _cells(name: str, where: str) -> list[Text]:
    """What each backend says to a call of an op or a variant on a type of device."""
    op, args = ops.get(name), ops.example(name, device=where)
    chosen = op.select("auto", *args)
    cells = []
    for candidate in backend.BACKENDS:
        reason = op.unsupported(candidate, *args)
        if candidate == chosen:
            cells.append(Text("auto", style="bold green"))
        elif reason is None:
            cells.append(Text("available", style="green"))
        else:  # a reason that holds for every op is told once, below the table
            cells.append(Text("no" if backend.missing[candidate] else f"no: {reason}", style="dim"))
    return cells


def tuning_list() -> Text:
    """Thresholds and tile sizes, with the device each is for and its source; those that are overridden are marked."""
    text = Text()
    for one in tuning.entries():
        text.append(f"{one.name} = {_number(one.value)}", style="bold")
        text.append(f" {one.unit}")
        if one.value != one.default:
            text.append(f"  overridden, not {_number(one.default)}", style="bold yellow")
        text.append(f"\n    {one.what}\n")
        text.append(f"    {one.device}; {one.source}\n", style="dim")
    return text


def _number(value: tuning.Value) -> str:
    """A value as the environment variable has it."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
