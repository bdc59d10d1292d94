"""Compiles csrc/ into one extension module with ninja: for setup.py, and for the tests in the emulator.

Needs Python's headers, pybind11 and ninja; no torch. Every ``csrc/<op>/cpu.cpp`` is compiled once for each
instruction set of `ISAS` where machine and compiler know them; every ``*.cu`` by nvcc, or for the emulator by the host
compiler.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).parent
CUDA_TARGETS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{CSRC}"]
CPU_FLAGS = ["-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
BASELINE = {"baseline": ISAS["baseline"]}
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-lineinfo",
    "--threads",
    "2",
    f"-I{CSRC}",
]
LINK_FLAGS = ["-shared", "-Wl,-s"]


def cxx() -> str | None:
    """The C++ compiler's command, or None if there is none."""
    named = os.environ.get("CXX")
    if named:
        return named if shutil.which(shlex.split(named)[0]) else None
    return shutil.which("g++") or shutil.which("clang++")


def nvcc() -> str | None:
    """nvcc's path, or None if there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def cpu_fault() -> str | None:
    """Why the CPU kernels cannot be compiled here, or None if they can.

    Tries the compiler on Python's headers and OpenMP.
    """
    compiler = cxx()
    if compiler is None:
        return "no C++ compiler is on the PATH or named by CXX"
    flags = [*COMMON_FLAGS, "-fopenmp", python_include(), *LINK_FLAGS]
    source = "#include <Python.h>\n#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"
    return fault([*shlex.split(compiler), *flags], "probe.cpp", source)


def cuda_fault() -> str | None:
    """Why the CUDA kernels cannot be compiled here, or None if they can."""
    compiler = nvcc()
    if compiler is None:
        return "no nvcc is on the PATH or in CUDA_HOME"
    if not cuda_targets():
        return f"{compiler} compiles for none of {', '.join(CUDA_TARGETS)}"
    return fault([compiler, "-std=c++17", "-c"], "probe.cu", "__global__ void probe() {}\n")


def fault(command: list[str], name: str, source: str) -> str | None:
    """What a compiler has against a source file, in one line; None if it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(source)
        result = subprocess.run([*command, name, "-o", "probe"], cwd=folder, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = (result.stderr or result.stdout).splitlines()
    wrong = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
    return f"{command[0]} compiles no probe: {wrong.strip()}"


def cuda_home(compiler: str) -> Path:
    """The toolkit folder that belongs to an nvcc, as nvcc itself reports it."""
    dry_run = subprocess.run(
        [compiler, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    top = next(line.split("=", 1)[1] for line in dry_run.stderr.splitlines() if "TOP=" in line)
    return Path(top.strip()).resolve()


def cuda_targets() -> tuple[str, ...]:
    """The compute capabilities to build for: TORCH_CUDA_ARCH_LIST, or what nvcc knows of `CUDA_TARGETS`.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST holds something else than ``9.0``, ``12.0+PTX`` and the like.
    """
    listed = tuple(os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split())
    for target in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", target):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: wanted capabilities such as 9.0 or 12.0+PTX, got {target!r}")
    if listed:
        return listed
    known = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    targets = [target for target in CUDA_TARGETS if f"compute_{target.replace('.', '')}" in known]
    return (*targets[:-1], f"{targets[-1]}+PTX") if targets else ()


def gencode(targets: tuple[str, ...]) -> list[str]:
    """nvcc's flags for targets such as ``9.0`` and ``12.0+PTX``."""
    flags = []
    for target in targets:
        number = target.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if target.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def python_include() -> str:
    """The include flag for Python's headers."""
    return f"-I{sysconfig.get_paths()['include']}"


def python_flags() -> list[str]:
    """Include flags for Python and pybind11."""
    import pybind11

    return [python_include(), f"-I{pybind11.get_include()}"]


def many_isas(compiler: str) -> bool:
    """Whether kernels are compiled for all of `ISAS`: on x86-64, by a compiler that knows their flags."""
    flags = [flag for isa in ISAS.values() for flag in isa]
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and fault([*shlex.split(compiler), *flags, "-c"], "probe.cpp", "int probe;\n") is None


class Plan:
    """What ninja is to compile and link.

    Args:
        compiler: the command of the C++ compiler.
        definitions: flags for every file.
        nvcc_flags: for every CUDA file.
    """

    def __init__(self, compiler: str, definitions: list[str], nvcc_flags: Sequence[str] = ()) -> None:
        self.rules = f"""rule cxx
  command = {compiler} {" ".join([*COMMON_FLAGS, *definitions])} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc()} {" ".join([*nvcc_flags, *definitions])} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} $in $flags -o $out
"""
        self.edges: list[str] = []
        self.objects: list[str] = []

    def compile(self, source: Path, flags: Sequence[str] = (), suffix: str = "", rule: str = "cxx") -> None:
        """Adds a file; `suffix` tells apart several ways of compiling it."""
        target = "_".join(source.relative_to(CSRC.parent).with_suffix("").parts) + suffix + ".o"
        self.objects.append(target)
        self.edges.append(f"build {target}: {rule} {source}\n  flags = {' '.join(flags)}\n")

    def compile_cpu(self, isas: dict[str, list[str]]) -> None:
        """Adds the CPU kernels, once for each instruction set, and what they share."""
        for source in sorted(CSRC.glob("common/*.cpp")):
            self.compile(source, CPU_FLAGS)
        for source in sorted(CSRC.glob("*/cpu*.cpp")):
            for isa, flags in isas.items():
                self.compile(source, [*CPU_FLAGS, *flags, f"-DZK_ISA={isa}"], f"_{isa}")

    def run(self, output: Path, work: Path, link_flags: list[str], verbose: bool = False) -> None:
        """Compiles what changed since the last run in the folder `work`, and links it to `output`.

        Raises:
            RuntimeError: a compiler failed; its output is in the message.
        """
        link = f"build {output.resolve()}: link {' '.join(self.objects)}\n  flags = {' '.join(link_flags)}\n"
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.rules + "".join(self.edges) + link)
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ninja", "-C", str(work)]
        result = subprocess.run(command, capture_output=not verbose, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"compiling {output.name} failed:\n{result.stdout or ''}{result.stderr or ''}")


def build(output: Path, work: Path, *, cuda: bool = False, emulator: bool = False, verbose: bool = False) -> None:
    """Compiles and links the extension module to `output`, with object files under `work`.

    Args:
        output: the module's file; its name up to the first dot is the module's name.
        work: a folder for object files; a second build in it compiles only what changed.
        cuda: include the CUDA kernels, compiled by nvcc for `cuda_targets()`.
        emulator: include the CUDA kernels, compiled for the emulator.
        verbose: print ninja's and the compilers' output.
    Raises:
        RuntimeError: a compiler failed; its output is in the message.
    """
    targets = cuda_targets() if cuda else ("emulator",) if emulator else ()
    definitions = [
        f"-DZK_MODULE_NAME={output.name.split('.')[0]}",
        f"-DZK_WITH_CUDA={int(cuda or emulator)}",
        f"-DZK_CUDA_TARGETS='\"{' '.join(targets)}\"'",
    ]
    many = not emulator and many_isas(cxx())
    nvcc_flags = [*NVCC_FLAGS, *gencode(targets)] if cuda else []
    plan = Plan(cxx(), [f"-DZK_EMULATED={int(emulator)}", f"-DZK_MANY_ISAS={int(many)}"], nvcc_flags)
    for source in (CSRC / "bindings.cpp", *sorted(CSRC.glob("*/bind.cpp"))):
        plan.compile(source, [*definitions, *python_flags()])
    plan.compile_cpu(ISAS if many else BASELINE)
    emulate = [f"-I{CSRC / 'emulator'}", "-Wno-unknown-pragmas", "-x c++"]
    for source in sorted(CSRC.glob("*/*.cu")) if cuda or emulator else ():
        plan.compile(source, emulate if emulator else [], rule="cxx" if emulator else "nvcc")
    if emulator:
        plan.compile(CSRC / "emulator/emulator.cpp", [f"-I{CSRC / 'emulator'}"])
    link_flags = [*LINK_FLAGS, "-fopenmp"]
    if cuda:
        lib = next(cuda_home(nvcc()).glob("**/libcudart_static.a")).parent
        link_flags += [f"-L{lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    plan.run(output, work, link_flags, verbose)


def build_program(main: Path, output: Path, work: Path, compiler: str) -> None:
    """Compiles a C++ program and the baseline CPU kernels, without Python, by any compiler, for its own machine.

    Raises:
        RuntimeError: the compiler failed or warned; its output is in the message.
    """
    # -Wno-pass-failed: clang leaves some loops scalar and says so; gcc ignores the flag.
    plan = Plan(compiler, ["-DZK_MANY_ISAS=0", "-Werror", "-Wno-pass-failed"])
    plan.compile(main)
    plan.compile_cpu(BASELINE)
    plan.run(output, work, ["-fopenmp"])
