"""The CUDA build: it imports without a driver, holds every target, and no kernel spills."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build_module

import zipformer_kernels
from zipformer_kernels import backend

triton = pytest.importorskip("triton", reason="triton brings cuobjdump")

RECORD = json.loads((Path(zipformer_kernels.__file__).parent / "_build.json").read_text())
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
needs_cuda_build = pytest.mark.skipif(
    RECORD["not_built"]["cuda"] is not None, reason=f"not built: {RECORD['not_built']['cuda']}"
)


@pytest.mark.skipif(RECORD["requested"] != "auto", reason="the kind of build was chosen by hand")
def test_auto_builds_cuda_wherever_nvcc_works():
    assert RECORD["not_built"]["cuda"] == build_module().cuda_fault()


@needs_cuda_build
def test_imports_without_a_driver():
    """A process that hides every GPU still imports the module and runs on the CPU."""
    code = """
import torch, zipformer_kernels
print(zipformer_kernels.explain("swoosh", backend="cpu").splitlines()[0])
print(zipformer_kernels.backend.native.build["cuda_targets"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    chosen, targets = result.stdout.splitlines()
    assert chosen == "swoosh: runs on 'cpu' (asked for: 'cpu')"
    assert tuple(targets.split()) == build_module().cuda_targets()


@needs_cuda_build
def test_needs_no_cuda_library():
    """cudart is linked in; the driver's library is opened by it when a GPU is first used."""
    result = subprocess.run(["ldd", backend.native.__file__], capture_output=True, text=True, check=True)
    assert "libcud" not in result.stdout
    assert "libtorch" not in result.stdout
    assert "libc10" not in result.stdout


@needs_cuda_build
def test_every_target_holds_the_same_kernels_and_none_spills():
    result = subprocess.run(
        [CUOBJDUMP, "-res-usage", backend.native.__file__], capture_output=True, text=True, check=True
    )
    kernels = {}
    target = None
    for line in result.stdout.splitlines():
        if found := re.search(r"arch = sm_(\d+\w?)", line):
            target = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            kernels.setdefault(target, {})[name] = {"stack": int(found[2]), "local": int(found[4])}
    wanted = {t.removesuffix("+PTX").replace(".", "") for t in build_module().cuda_targets()}
    assert set(kernels) == wanted
    names = [set(by_name) for by_name in kernels.values()]
    assert all(names[0] == other for other in names)
    assert len(names[0]) >= 12, "Swoosh alone has twelve: two directions, three dtypes, two kinds"
    spilled = {
        (target, name): use
        for target, by_name in kernels.items()
        for name, use in by_name.items()
        if use["stack"] or use["local"]
    }
    assert spilled == {}


@needs_cuda_build
def test_the_newest_target_carries_ptx_for_gpus_to_come():
    result = subprocess.run(
        [CUOBJDUMP, "--list-ptx", backend.native.__file__], capture_output=True, text=True, check=True
    )
    ptx = set(re.findall(r"sm_(\d+)\.ptx", result.stdout))
    wanted = {t.removesuffix("+PTX").replace(".", "") for t in build_module().cuda_targets() if t.endswith("+PTX")}
    assert ptx == wanted


def test_the_targets_can_be_narrowed(monkeypatch):
    build = build_module()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert build.cuda_targets() == ("8.0", "9.0a", "12.0+PTX")
    assert build.gencode(build.cuda_targets()) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: wanted capabilities such as .*got 'Hopper'"):
        build.cuda_targets()
