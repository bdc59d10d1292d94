"""The CPU kernels without Python, checked by tests/kernels.cpp: here, on aarch64 under QEMU, and built by clang."""

import shutil
import subprocess
from pathlib import Path

import pytest
from emulator import ROOT, build_module

PACKAGES = {  # what brings a command, on Debian
    "g++": "g++",
    "clang++": "clang and libomp-dev",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}


@pytest.mark.parametrize(
    ("compiler", "emulator"),
    [("g++", []), ("clang++", []), ("aarch64-linux-gnu-g++", ["qemu-aarch64"])],
    ids=["gcc", "clang", "aarch64"],
)
def test_kernels_agree_with_plain_loops(compiler, emulator):
    for command in (compiler, *emulator):
        if shutil.which(command) is None:
            pytest.skip(f"{command} would run this; Debian has it in {PACKAGES[command]}")
    program = ROOT / "build" / "portable" / compiler / "kernels"
    build_module().build_program(Path(__file__).with_name("kernels.cpp"), program, program.parent, compiler)
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("good") == 2 * 4 * 9  # thread counts, dtypes, checks
