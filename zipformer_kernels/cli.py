"""The command ``zipformer-kernels``."""

from __future__ import annotations

import sys
from typing import NoReturn

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

    try:
        sys.exit(commands.app(sys.argv[1:] or ["--help"], prog_name="zipformer-kernels", standalone_mode=False))
    except commands.UsageError as error:
        fail(f"{error.format_message()} (--help tells more)")
    except commands.USER_ERRORS as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Exits with code 2 and one line on stderr."""
    tell(message)
    sys.exit(2)


def tell(message: str) -> None:
    """Writes one line on stderr."""
    print(f"zipformer-kernels: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
