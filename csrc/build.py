"""Compiles csrc/ into one extension module with ninja: for setup.py, and for the tests in the emulator.

Needs Python's headers, pybind11 and ninja; no torch. Every ``csrc/<op>/cpu.cpp`` is compiled once for each
instruction set of `ISAS` where machine and compiler know them; every ``*.cu`` by nvcc, or for the emulator by the host
compiler. Objects are named after what they were compiled for, so that several builds can share a folder of them.
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
sys.path.insert(0, str(CSRC))
import gpus  # noqa: E402

CUDA_TARGETS = ("8.0", "9.0", "10.0", "12.0")  # later GPUs of the same first number run the same code

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{CSRC}"]
CPU_FLAGS = ["-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
BIND_FLAGS = ["-O1"]  # they only pass arguments on; a call takes as long as with -O3, compiling less
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
STRIP_FLAGS = ["-Wl,-s"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]


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
    flags = [*COMMON_FLAGS, "-fopenmp", python_include(), "-shared"]
    source = "#include <Python.h>\n#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"
    return fault([*shlex.split(compiler), *flags], "probe.cpp", source)


def cuda_plan(every: bool) -> tuple[tuple[str, ...], str | None]:
    """The compute capabilities to compile CUDA kernels for, and None; or none, and why they cannot be compiled.

    Args:
        every: for all of `CUDA_TARGETS` that nvcc knows, not for the GPUs seen here alone. TORCH_CUDA_ARCH_LIST comes
            before both.
    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST holds something else than ``9.0``, ``12.0+PTX`` and the like.
    """
    compiler = nvcc()
    if compiler is None:
        return (), "no nvcc is on the PATH or in CUDA_HOME"
    targets = listed_targets() or known_targets(compiler)
    if not targets:
        return (), f"{compiler} compiles for none of {', '.join(CUDA_TARGETS)}"
    if not every and not listed_targets():
        targets, reason = seen_targets(compiler)
        if not targets:
            return (), f"{reason}; ZIPFORMER_KERNELS_BUILD=cuda builds for all"
    wrong = fault([compiler, "-std=c++17", "-c"], "probe.cu", "__global__ void probe() {}\n")
    return ((), wrong) if wrong else (targets, None)


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


def listed_targets() -> tuple[str, ...]:
    """What TORCH_CUDA_ARCH_LIST asks for; empty where it is not set.

    Raises:
        ValueError: it holds something else than ``9.0``, ``12.0+PTX`` and the like.
    """
    listed = tuple(os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split())
    for target in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", target):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: wanted capabilities such as 9.0 or 12.0+PTX, got {target!r}")
    return listed


def compiled_capabilities(compiler: str) -> list[tuple[int, int]]:
    """The compute capabilities that an nvcc knows, such as (9, 0), sorted."""
    listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return sorted((int(major), int(minor)) for major, minor in re.findall(r"compute_(\d+)(\d)\b", listed))


def known_targets(compiler: str) -> tuple[str, ...]:
    """What an nvcc knows of `CUDA_TARGETS`, the last with PTX for GPUs to come."""
    known = compiled_capabilities(compiler)
    targets = [target for target in CUDA_TARGETS if capability(target) in known]
    return (*targets[:-1], f"{targets[-1]}+PTX") if targets else ()


def seen_targets(compiler: str) -> tuple[tuple[str, ...], str]:
    """The targets for the GPUs seen here; or none, and why. A GPU newer than nvcc gets PTX."""
    try:
        seen = gpus.capabilities()
    except gpus.NoGpu as reason:
        return (), f"no GPU is seen here: {reason}"
    oldest, known = capability(CUDA_TARGETS[0]), compiled_capabilities(compiler)
    targets = set()
    for gpu in seen:
        usable = [one for one in known if oldest <= one <= gpu]
        if usable:
            targets.add("{}.{}".format(*usable[-1]) + ("" if usable[-1] == gpu else "+PTX"))
    listed = ", ".join("{}.{}".format(*gpu) for gpu in seen)
    return tuple(sorted(targets, key=capability)), f"the GPUs seen here ({listed}) are older than {CUDA_TARGETS[0]}"


def capability(target: str) -> tuple[int, int]:
    """(12, 0) of a target such as ``12.0+PTX``."""
    major, minor = re.match(r"(\d+)\.(\d)", target).groups()
    return int(major), int(minor)


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
        flags: for every C++ file.
        level: how far kernels are optimised.
    """

    def __init__(self, compiler: str, flags: Sequence[str], level: str = "-O3") -> None:
        self.cpu_flags = [level, *CPU_FLAGS]
        self.rules = f"""rule cxx
  command = {compiler} {" ".join([*COMMON_FLAGS, *flags])} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc()} {" ".join(NVCC_FLAGS)} $flags -MD -MF $out.d -c $in -o $out
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
            self.compile(source, self.cpu_flags)
        for source in sorted(CSRC.glob("*/cpu*.cpp")):
            for isa, flags in isas.items():
                self.compile(source, [*self.cpu_flags, *flags, f"-DZK_ISA={isa}"], f"_{isa}")

    def compile_cuda(self, targets: Sequence[str]) -> None:
        """Adds the CUDA kernels, by nvcc for `targets`."""
        for source in sorted(CSRC.glob("*/*.cu")):
            self.compile(source, gencode(targets), f"_{'_'.join(targets)}", rule="nvcc")

    def compile_emulated(self) -> None:
        """Adds the CUDA kernels, by the host compiler for the emulator, and the emulator."""
        flags = ["-O3", f"-I{CSRC / 'emulator'}"]
        for source in sorted(CSRC.glob("*/*.cu")):
            self.compile(source, [*flags, "-Wno-unknown-pragmas", "-x c++"], "_emulated")
        self.compile(CSRC / "emulator/emulator.cpp", flags)

    def compile_bindings(self, module: str, targets: Sequence[str], emulated: bool) -> None:
        """Adds Python's entry points of a module that holds CUDA kernels for `targets`, which may be none."""
        flags = [*BIND_FLAGS, *python_flags(), f"-DZK_MODULE_NAME={module}", f"-DZK_WITH_CUDA={int(bool(targets))}"]
        flags += [f"-DZK_CUDA_TARGETS='\"{' '.join(targets)}\"'", f"-DZK_EMULATED={int(emulated)}"]
        self.compile(CSRC / "bindings.cpp", flags, "_".join(["", module, *targets]))

    def run(self, output: Path, work: Path, link_flags: list[str], verbose: bool = False) -> None:
        """Compiles what changed since the last run in the folder `work`, and links it to `output`.

        Processes that build in the same folder wait for each other.

        Raises:
            RuntimeError: a compiler failed; its output is in the message.
        """
        import fcntl  # not on Windows, where the package installs without kernels

        link = f"build {output.resolve()}: link {' '.join(self.objects)}\n  flags = {' '.join(link_flags)}\n"
        work.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ninja", "-C", str(work)]
        with open(work / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (work / "build.ninja").write_text(self.rules + "".join(self.edges) + link)
            result = subprocess.run(command, capture_output=not verbose, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"compiling {output.name} failed:\n{result.stdout or ''}{result.stderr or ''}")


def module_plan(name: str, cuda: Sequence[str], *, emulator: bool = False, sanitize: bool = False) -> Plan:
    """What is compiled for a module, all but linking it; arguments as of `build`."""
    many = many_isas(cxx())
    flags = [f"-DZK_MANY_ISAS={int(many)}"]
    # With sanitizers, compiling takes longest: at -O3 three times as long as all tests.
    plan = Plan(cxx(), [*flags, *SANITIZE_FLAGS], level="-O1") if sanitize else Plan(cxx(), flags)
    plan.compile_bindings(name, ("emulator",) if emulator else cuda, emulator)
    plan.compile_cpu(ISAS if many else BASELINE)
    if emulator:
        plan.compile_emulated()
    elif cuda:
        plan.compile_cuda(cuda)
    return plan


def build(
    output: Path,
    work: Path,
    *,
    cuda: Sequence[str] = (),
    emulator: bool = False,
    sanitize: bool = False,
    verbose: bool = False,
) -> None:
    """Compiles and links the extension module to `output`, with object files under `work`.

    Args:
        output: the module's file; its name up to the first dot is the module's name.
        work: a folder for object files; a second build in it compiles only what changed.
        cuda: the targets for which nvcc compiles the CUDA kernels; none by default.
        emulator: include the CUDA kernels, compiled for the emulator.
        sanitize: stop with a report at a wrong access (AddressSanitizer) or undefined behaviour (UBSan). Such a module
            can be imported only where the sanitizers' libraries are preloaded, and needs a folder `work` of its own.
        verbose: print ninja's and the compilers' output.
    Raises:
        RuntimeError: a compiler failed; its output is in the message.
    """
    name = output.name.split(".")[0]
    plan = module_plan(name, tuple(cuda), emulator=emulator, sanitize=sanitize)
    link_flags = ["-shared", "-fopenmp", *(SANITIZE_FLAGS if sanitize else STRIP_FLAGS)]
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
