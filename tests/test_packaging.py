"""What is shipped builds and runs elsewhere: the source distribution, wheels with and without compilers."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import zipformer_kernels

ROOT = Path(__file__).parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NOT_SHIPPED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build.json")


def run(*command, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def booby_trap(tmp_path_factory):
    """A folder whose `torch` cannot be imported: nobody may need it while the package is built."""
    folder = tmp_path_factory.mktemp("trap")
    (folder / "torch.py").write_text("raise ImportError('torch was imported while the package was built')")
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, booby_trap):
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_SHIPPED)
    command = ["-m", "build", "--sdist", "--no-isolation", "--outdir", folder / "out"]
    run(*command, cwd=folder / "tree", PYTHONPATH=str(booby_trap), ZIPFORMER_KERNELS_BUILD="none")
    (archive,) = (folder / "out").iterdir()
    return archive


def wheel_of(sdist, folder, *options, **environment):
    """Builds a wheel; its file and the record of what was built."""
    run("-m", "pip", "wheel", sdist, "--no-deps", "--wheel-dir", folder, *options, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        record = json.loads(file.read("zipformer_kernels/_build.json"))
        names = file.namelist()
    assert not [name for name in names if not name.startswith(("zipformer_kernels/", "zipformer_kernels-"))]
    assert "zipformer_kernels/py.typed" in names
    assert wheel.name.startswith(f"zipformer_kernels-{zipformer_kernels.__version__}-")
    assert not [name for name in names if "/bench/" in name or "harness" in name]
    return wheel, record, [name for name in names if name.endswith(SUFFIX)]


def installed_copy_runs(wheel, folder, backend):
    """Installs the wheel alone in a folder and calls an op there on the backend that `auto` picks."""
    run("-m", "pip", "install", wheel, "--no-deps", "--target", folder / "site", cwd=folder)
    code = """
import sys  # an editable install would lend its compiled module
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch, zipformer_kernels
print(zipformer_kernels.__file__)
print(zipformer_kernels.explain("swoosh").splitlines()[0])
x = torch.randn(1000)
same = zipformer_kernels.swoosh_l(x), zipformer_kernels.swoosh_l(x, backend="eager")
torch.testing.assert_close(*same, rtol=1e-6, atol=1e-6)
"""
    where, chosen = run("-c", code, cwd=folder, PYTHONPATH=str(folder / "site")).splitlines()
    assert Path(where).is_relative_to(folder)
    assert chosen == f"swoosh: runs on '{backend}' (asked for: 'auto')"


def test_the_source_distribution_holds_everything(sdist):
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    needed = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "zipformer_kernels/py.typed",
    }
    for folder in ("csrc", "zipformer_kernels", "tests", "benchmarks", "demo", "docs", "examples"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        suffixes = (".py", ".h", ".cpp", ".cu", ".wav", ".md")
        needed |= {path.relative_to(ROOT).as_posix() for path in files if path.suffix in suffixes}
    assert needed - names == set()
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "_build.json"))]


def test_pure_python_by_choice(sdist, tmp_path, booby_trap):
    environment = {"PYTHONPATH": str(booby_trap), "ZIPFORMER_KERNELS_BUILD": "none"}
    wheel, record, modules = wheel_of(sdist, tmp_path, "--no-build-isolation", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert modules == []
    reason = "ZIPFORMER_KERNELS_BUILD was 'none'"
    assert record == {"requested": "none", "not_built": {"cpu": reason, "cuda": reason}}
    installed_copy_runs(wheel, tmp_path, "eager")


def test_pure_python_where_there_is_no_compiler(sdist, tmp_path, booby_trap):
    (tmp_path / "bin").mkdir()
    environment = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(booby_trap), "CUDA_HOME": "", "CXX": ""}
    environment |= {"ZIPFORMER_KERNELS_BUILD": "auto"}
    wheel, record, modules = wheel_of(sdist, tmp_path, "--no-build-isolation", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert modules == []
    reason = "no C++ compiler is on the PATH or named by CXX"
    assert record == {"requested": "auto", "not_built": {"cpu": reason, "cuda": reason}}


def test_a_compiler_that_does_not_work_is_no_error_but_told(sdist, tmp_path, booby_trap):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'error: no license' >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "PYTHONPATH": str(booby_trap), "ZIPFORMER_KERNELS_BUILD": "auto"}
    _, record, modules = wheel_of(sdist, tmp_path, "--no-build-isolation", **environment)
    assert modules == []
    assert record["not_built"]["cpu"] == f"{compiler} compiles no probe: error: no license"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("gpu", "ZIPFORMER_KERNELS_BUILD must be one of auto, cpu, cuda, none, got 'gpu'"),
        (
            "cpu",
            "ZIPFORMER_KERNELS_BUILD=cpu cannot be built: no C++ compiler is on the PATH or named by CXX",
        ),
        ("cuda", "ZIPFORMER_KERNELS_BUILD=cuda cannot be built: no C++ compiler"),
    ],
)
def test_a_choice_that_cannot_be_built_is_an_error(tmp_path, choice, message):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=NOT_SHIPPED)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {"PATH": "", "CXX": "", "CUDA_HOME": "", "ZIPFORMER_KERNELS_BUILD": choice}
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# What is asked is whether all sources are there: one instruction set, not optimised, does for that.
QUICK = """#!/bin/bash
case "$*" in *-mavx*) exit 1; esac
exec g++ "${@/#-O[1-3]/-O0}"
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_cpu_kernels_in_an_isolated_environment(sdist, tmp_path):
    """pip brings setuptools, pybind11 and ninja from the package index, and nothing else is there."""
    compiler = tmp_path / "compiler"
    compiler.write_text(QUICK)
    compiler.chmod(0o755)
    wheel, record, modules = wheel_of(sdist, tmp_path, ZIPFORMER_KERNELS_BUILD="cpu", CXX=str(compiler))
    assert modules == [f"zipformer_kernels/_native{SUFFIX}"]
    assert record == {
        "requested": "cpu",
        "not_built": {"cpu": None, "cuda": "ZIPFORMER_KERNELS_BUILD was 'cpu'"},
    }
    installed_copy_runs(wheel, tmp_path, "cpu")
