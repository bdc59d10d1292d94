"""Builds the compiled module while the package is built; everything else stands in pyproject.toml.

ZIPFORMER_KERNELS_BUILD chooses what is compiled: ``auto`` (CPU kernels if there is a C++ compiler, CUDA kernels too for
the GPUs that are seen here if there is nvcc), ``cpu``, ``cuda`` (both, CUDA for every target: an error if they cannot
be built) or ``none``. TORCH_CUDA_ARCH_LIST names other targets. What was not built, and why, is written to
``zipformer_kernels/_build.json``, which ``zipformer-kernels info`` reads.
"""

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
import build as native  # noqa: E402

MODES = ("auto", "cpu", "cuda", "none")


def plan(requested: str) -> tuple[tuple[str, ...], dict[str, str | None]]:
    """The CUDA targets; and for each kind of kernels, ``cpu`` and ``cuda``, None if it is built, else why not."""
    if requested not in MODES:
        raise SystemExit(f"ZIPFORMER_KERNELS_BUILD must be one of {', '.join(MODES)}, got {requested!r}")
    unwanted = f"ZIPFORMER_KERNELS_BUILD was {requested!r}"
    if requested == "none":
        return (), {"cpu": unwanted, "cuda": unwanted}
    targets, faults = (), {"cpu": native.cpu_fault(), "cuda": unwanted}
    if requested != "cpu":
        targets, faults["cuda"] = ((), faults["cpu"]) if faults["cpu"] else native.cuda_plan(requested == "cuda")
    if requested != "auto" and faults[requested] is not None:
        raise SystemExit(f"ZIPFORMER_KERNELS_BUILD={requested} cannot be built: {faults[requested]}")
    return targets, faults


class BuildNative(build_ext):
    """Compiles csrc/ with ninja in place of setuptools' own compiler calls."""

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        # An editable install keeps its objects, to compile only what changed. (`inplace` is 0 while it is built.)
        work = ROOT / "build" / "objects" if self.editable_mode else Path(self.build_temp).resolve()
        native.build(output, work, cuda=targets, verbose=True)


class BuildPython(build_py):
    """Adds the record of what is compiled."""

    def run(self) -> None:
        super().run()
        package = Path("zipformer_kernels")
        target = ROOT / package if self.editable_mode else Path(self.build_lib) / package
        record = {"requested": requested, "not_built": faults}
        (target / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
        if self.editable_mode and not extensions:
            for stale in target.glob("_native.*"):
                stale.unlink()


requested = os.environ.get("ZIPFORMER_KERNELS_BUILD", "auto")
targets, faults = plan(requested)
extensions = [] if faults["cpu"] else [Extension("zipformer_kernels._native", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative, "build_py": BuildPython})
