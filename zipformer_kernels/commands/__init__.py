"""The commands of ``zipformer-kernels``: one file each."""

from __future__ import annotations

import typer

from zipformer_kernels.checkpoint import CheckpointError
from zipformer_kernels.commands.audio import AudioError
from zipformer_kernels.commands.bench import MovedError, bench
from zipformer_kernels.commands.encode import ArgumentError, encode
from zipformer_kernels.commands.info import info
from zipformer_kernels.core.backend import BackendError

USER_ERRORS = (AudioError, BackendError, CheckpointError, ArgumentError, MovedError)
"""What is told in one line, without a traceback."""

app = typer.Typer(
    help="Fused kernels for the Zipformer speech encoder.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)
app.command()(encode)
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(bench)
