"""The CPU kernels on other machines: one binary on processors of all ages, other compilers, aarch64.

tests/kernels.cpp checks the kernels without Python: built here by two compilers, and for aarch64, which QEMU runs.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import ROOT, build_module
from tolerances import assert_agrees, rounding

from zipformer_kernels import swoosh_l
from zipformer_kernels.core import backend

PACKAGES = {  # what brings a command, on Debian
    "g++": "g++",
    "clang++": "clang and libomp-dev",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "qemu-x86_64": "qemu-user",
}
OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


def need(command):
    if shutil.which(command) is None:
        pytest.skip(f"{command} would run this; Debian has it in {PACKAGES[command]}")


@pytest.mark.parametrize(
    ("compiler", "emulator"),
    [("g++", []), ("clang++", []), ("aarch64-linux-gnu-g++", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"])],
    ids=["gcc", "clang", "aarch64"],
)
def test_kernels_agree_with_plain_loops(compiler, emulator):
    """The sources give no warnings, and the kernels the results of double precision."""
    for command in (compiler, *emulator[:1]):
        need(command)
    build = build_module()
    fault = build.fault([compiler, "-fopenmp"], "probe.cpp", OPENMP)
    if fault:
        pytest.skip(f"{fault}; Debian has what it needs in {PACKAGES[compiler]}")
    program = ROOT / "build" / "portable" / compiler / "kernels"
    build.build_program(Path(__file__).with_name("kernels.cpp"), program, program.parent, compiler)
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("good") == 2 * (4 * 10 + 2)  # thread counts, dtypes, checks; linear has two dtypes


X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an x86-64 machine would run this")


@X86
@pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}")
@pytest.mark.parametrize(("processor", "isa"), [("Nehalem", "baseline"), ("Haswell", "avx2")])
def test_one_binary_runs_on_older_processors(processor, isa):
    """QEMU, which refuses the instructions that a processor lacks, runs this module without torch."""
    need("qemu-x86_64")
    code = f"""
import importlib.util
from array import array

spec = importlib.util.spec_from_file_location("{backend.native.__name__}", "{backend.native.__file__}")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(native.current_isa())
x, y = array("f", range(-30, 31)), array("f", [0] * 61)
native.swoosh_forward_cpu(x.buffer_info()[0], y.buffer_info()[0], 61, 0, 0, 1)
print(*y)
"""
    command = ["qemu-x86_64", "-cpu", processor, sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    if f".{isa} " in result.stderr:
        pytest.skip("QEMU 7.2 or later would run this")
    assert result.returncode == 0, result.stderr
    chosen, values = result.stdout.splitlines()
    assert chosen == isa
    expected = swoosh_l(torch.arange(-30.0, 31.0), backend="eager")
    assert_agrees(torch.tensor([float(value) for value in values.split()]), expected, rounding(torch.float32))


@X86
def test_a_compiler_that_lacks_an_instruction_set(tmp_path):
    """It compiles the kernels for the baseline alone."""
    build = build_module()
    lacking = tmp_path / "compiler"
    lacking.write_text('#!/bin/sh\ncase "$*" in *-mavx512*) exit 1; esac\nexec g++ "$@"\n')
    lacking.chmod(0o755)
    need("g++")
    assert build.many_isas("g++")
    assert not build.many_isas(str(lacking))
