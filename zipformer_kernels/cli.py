"""The command ``zipformer-kernels``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer

PROGRAM = "zipformer-kernels"
# What the extra `cli` brings.
EXTRA = ("typer", "rich", "soundfile", "kaldi_native_fbank", "soxr", "safetensors")


def main() -> None:
    """Runs the command line; exits with code 2 and one line on stderr where the user's input is at fault."""
    try:
        run()
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        if missing not in EXTRA:
            raise
        fail(f"{missing} is not installed: pip install 'zipformer-kernels[cli]'")


def run() -> None:
    """Runs the command line, and raises what is the package's fault or its installation's."""
    from zipformer_kernels import commands

    serve(commands.app, sys.argv[1:] or ["--help"], PROGRAM, commands.USER_ERRORS)


def serve(app: typer.Typer, arguments: list[str], program: str, errors: tuple[type[Exception], ...]) -> NoReturn:
    """Runs an app on these arguments; exits with code 2 and one line on stderr where the user's input is at fault.

    Args:
        app: what is run.
        arguments: of the command line.
        program: how the user calls it.
        errors: what is told in one line, besides a command line that cannot be parsed.
    """
    import typer

    usage_error = typer.BadParameter.__base__  # typer has no other name for what its parser raises
    try:
        sys.exit(app(arguments, prog_name=program, standalone_mode=False))
    except usage_error as error:
        fail(f"{error.format_message()} (--help tells more)", program)
    except errors as error:
        fail(str(error), program)


def fail(message: str, program: str = PROGRAM) -> NoReturn:
    """Exits with code 2 and one line on stderr."""
    tell(message, program)
    sys.exit(2)


def tell(message: str, program: str = PROGRAM) -> None:
    """Writes one line on stderr."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
