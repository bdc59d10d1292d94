"""Compiled modules that tests need beside the installed one, built once per checkout and shared by all processes.

``python tests/compiled.py`` builds them all at once, on all cores, before many processes ask for them.
"""

import functools
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def load(name: str, path: Path) -> ModuleType:
    """Imports a file under a name that the import system does not know it by."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def build_module() -> ModuleType:
    """csrc/build.py, imported from the checkout."""
    return load("zipformer_kernels_build", ROOT / "csrc" / "build.py")


def compile_module(name: str, **options: object) -> Path:
    """The file of module `name`, compiled by `build` of csrc/build.py with `options`.

    Objects lie in the folder that an editable install compiles into: what it has compiled is there already.
    """
    output = ROOT / "build" / name / f"{name}{SUFFIX}"
    build_module().build(output, ROOT / "build" / "objects", **options)
    return output


@functools.cache
def emulated_module() -> ModuleType:
    """The module with its CUDA kernels compiled for the emulator."""
    return load("_emulated", compile_module("_emulated", emulator=True))


@functools.cache
def all_targets() -> tuple[tuple[str, ...], str | None]:
    """Every CUDA target, and None; or none, and why nvcc cannot compile here."""
    return build_module().cuda_plan(every=True)


@functools.cache
def module_for_all_targets() -> Path:
    """The file of the module with its CUDA kernels compiled by nvcc for `all_targets`."""
    return compile_module("_all_targets", cuda=all_targets()[0])


if __name__ == "__main__":
    emulated_module()
    if all_targets()[0]:
        module_for_all_targets()
    else:
        print(f"no CUDA targets: {all_targets()[1]}", file=sys.stderr)
