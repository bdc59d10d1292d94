"""Builds the compiled module while the package is built; everything else stands in pyproject.toml.

ZIPFORMER_KERNELS_BUILD chooses what is compiled: ``auto`` (CPU kernels if there is a C++ compiler, CUDA kernels too if
there is nvcc), ``cpu``, ``cuda`` (an error if they cannot be built) or ``none``.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
import build as native  # noqa: E402

MODES = ("auto", "cpu", "cuda", "none")


def choose_mode() -> str:
    """``cpu``, ``cuda`` or ``none``, from ZIPFORMER_KERNELS_BUILD and the compilers at hand."""
    mode = os.environ.get("ZIPFORMER_KERNELS_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"ZIPFORMER_KERNELS_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "auto":
        mode = "none" if native.cxx() is None else "cpu" if native.nvcc() is None else "cuda"
        print(f"zipformer_kernels: ZIPFORMER_KERNELS_BUILD=auto builds {mode!r}")
    if mode != "none" and native.cxx() is None:
        raise SystemExit(f"ZIPFORMER_KERNELS_BUILD={mode} needs a C++ compiler: none is on the PATH or in CXX")
    if mode == "cuda" and native.nvcc() is None:
        raise SystemExit("ZIPFORMER_KERNELS_BUILD=cuda needs nvcc: none is on the PATH or in CUDA_HOME")
    return mode


class BuildNative(build_ext):
    """Compiles csrc/ with ninja in place of setuptools' own compiler calls."""

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        work = Path(self.build_temp).resolve() / mode
        native.build(output, work, cuda=mode == "cuda", verbose=True)


mode = choose_mode()
extensions = [] if mode == "none" else [Extension("zipformer_kernels._native", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
