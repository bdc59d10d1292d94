"""What a run on a GPU machine need not make there: the compiled module, Triton's kernels, and wheels.

``python prepared.py make FOLDER --capability 9.0`` makes them on any machine with nvcc, for the Python and the Triton
that run it. ``python prepared.py use FOLDER`` takes what fits, on the GPU machine, and compiles the module there where
it does not fit or there is no such folder. Triton compiles what it does not find in its cache.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from compiled import SUFFIX, build_module  # noqa: E402

from benchmarks.gpu.stages import cores  # noqa: E402

PACKAGE = ROOT / "zipformer_kernels"
OBJECTS = ROOT / "build" / "objects"
SITE = ROOT / "build" / "site"
WHEELS = ("zipformer==0.1.3",)  # upstream, without its needs; what else is needed comes with torch or pytest
MANIFEST = "manifest.json"


def sources() -> str:
    """What the module is compiled from, as one number."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def triton_version() -> str | None:
    """The version of Triton here, or None."""
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None


def manifest(targets: tuple[str, ...]) -> dict[str, object]:
    """What has to agree for things prepared elsewhere to fit."""
    return {"module": [SUFFIX, *targets, sources()], "triton": [SUFFIX, *targets, triton_version()]}


# ---- make ----


def make(folder: Path, capability: str) -> int:
    """Fills the folder; prints what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = (capability,)
    build_module().build(folder / f"_native{SUFFIX}", OBJECTS, cuda=targets)
    if triton_version():
        with tempfile.TemporaryDirectory() as cache:
            compile_triton(Path(cache), "sm_" + capability.replace(".", ""))
            shutil.make_archive(str(folder / "triton"), "xztar", cache)  # a seventh of the cache, most of it text
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder / "wheels"), *WHEELS]
    subprocess.run(download, check=True)
    (folder / MANIFEST).write_text(json.dumps(manifest(targets), indent=1) + "\n")
    for path in sorted(folder.iterdir()):
        print(f"{size(path) / 1e6:6.1f} MB  {path.name}")
    print(f"{size(folder) / 1e6:6.1f} MB  in all")
    return 0


def compile_triton(cache: Path, target: str) -> None:
    """Compiles what the ops' small cases launch, in the dtypes that tests/aot.py takes, into a cache of Triton's."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    names = sorted(path.parent.name for path in PACKAGE.glob("ops/*/triton.py"))

    def compile_op(name: str) -> None:
        command = [sys.executable, str(ROOT / "tests" / "aot.py"), name, target]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(compile_op, names))


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(part.stat().st_size for part in (path, *path.rglob("*")) if part.is_file())


# ---- use ----


def use(folder: Path) -> int:
    """Puts everything in place; 1 if there are no compiled kernels in the end."""
    for line in (*take_wheels(folder), *take_triton(folder)):
        print(line, flush=True)
    targets, reason = build_module().cuda_plan(every=False)
    wanted = "cuda" if targets else "cpu"
    if reason is not None:
        print(f"no CUDA kernels: {reason}", flush=True)
    if targets and fits(folder, "module", targets):
        shutil.copy2(folder / f"_native{SUFFIX}", PACKAGE)
        print("the prepared module is taken", flush=True)
        if missing(wanted) is None:
            return record(wanted)
        print(f"but does not work: {missing(wanted)}", flush=True)
    if wanted == "cpu" and missing("cpu") is None:
        print("the module that is there will do", flush=True)
        return 0
    print(f"compiling for {', '.join(targets) or 'the CPU'}", flush=True)
    try:
        build_module().build(PACKAGE / f"_native{SUFFIX}", OBJECTS, cuda=targets)
    except (RuntimeError, OSError, AttributeError) as error:
        print(error, flush=True)
        return 1
    print(f"compiled; {wanted}: {missing(wanted) or 'works'}", flush=True)
    return record(wanted) if missing(wanted) is None else 1


def fits(folder: Path, part: str, targets: tuple[str, ...]) -> bool:
    """Whether a part that was prepared is for this machine and these sources."""
    path = folder / MANIFEST
    return path.is_file() and json.loads(path.read_text()).get(part) == manifest(targets)[part]


def take_wheels(folder: Path) -> Iterator[str]:
    """Installs the wheels where this run looks, beside what the machine has."""
    wheels = [str(path) for path in sorted((folder / "wheels").glob("*.whl"))]
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
        result = subprocess.run([*command, "--target", str(SITE), *wheels], capture_output=True, text=True)
        yield f"wheels: {len(wheels)} installed" if result.returncode == 0 else f"wheels: {result.stderr.strip()}"


def take_triton(folder: Path) -> Iterator[str]:
    """Copies Triton's kernels into the cache of this run."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    archive = folder / "triton.tar.xz"
    if cache and archive.is_file() and fits(folder, "triton", build_module().cuda_plan(every=False)[0]):
        shutil.unpack_archive(archive, cache)
        yield f"Triton's cache: {sum(1 for _ in Path(cache).iterdir())} kernels"


def missing(name: str) -> str | None:
    """Why a backend cannot run in a new process, or None if it can."""
    code = f"from zipformer_kernels.core import backend; print(backend.missing[{name!r}] or '')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    if result.returncode != 0:
        return (result.stderr.splitlines() or ["no message"])[-1]
    return result.stdout.strip() or None


def record(built: str) -> int:
    """Writes what an installation leaves beside the module, for ``zipformer-kernels info``."""
    not_built = {"cpu": None, "cuda": None if built == "cuda" else "this build was for the CPU"}
    (PACKAGE / "_build.json").write_text(json.dumps({"requested": built, "not_built": not_built}, indent=1) + "\n")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name, text in (("make", "make them, on any machine with nvcc"), ("use", "put them in place, or compile")):
        part = parts.add_parser(name, help=text, description=text)
        part.add_argument("folder", type=Path)
        if name == "make":
            part.add_argument("--capability", default="9.0", help="of the GPU; 9.0 (H100, H200) by default")
    arguments = parser.parse_args()
    return make(arguments.folder, arguments.capability) if arguments.part == "make" else use(arguments.folder)


if __name__ == "__main__":
    sys.exit(main())
