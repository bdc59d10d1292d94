"""The CUDA build: for which GPUs it is made; it imports without a driver and holds every target; its machine code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import ROOT, all_targets, build_module, module_for_all_targets

import zipformer_kernels

triton = pytest.importorskip("triton", reason="triton brings cuobjdump")

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


# ---- for which GPUs ----


def test_auto_builds_for_the_gpus_seen():
    record = json.loads((Path(zipformer_kernels.__file__).parent / "_build.json").read_text())
    if record["requested"] != "auto":
        pytest.skip("the kind of build was chosen by hand")
    assert record["not_built"]["cuda"] == build_module().cuda_plan(every=False)[1]


DRIVER = """
#include <cstdlib>
#include <cstring>

static const char* gpus = std::getenv("GPUS");  // such as "9.0 12.0"

extern "C" int cuInit(unsigned) { return std::strcmp(gpus, "fault") == 0 ? 100 : 0; }
extern "C" int cuDeviceGetCount(int* count) { return *count = (std::strlen(gpus) + 1) / 4, 0; }
extern "C" int cuDeviceGet(int* device, int index) { return *device = 7 * index, 0; }
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const char* gpu = gpus + 4 * (device / 7);
  return *value = gpu[attribute == 75 ? 0 : 2] - '0', attribute == 75 || attribute == 76 ? 0 : 1;
}
"""
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_75 compute_80 compute_86 compute_90 | tr ' ' '\\n'; fi
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """`cuda_plan` on a machine with other GPUs: a driver that shows those of the variable GPUS, and an nvcc to 9.0."""
    folder = tmp_path_factory.mktemp("machine")
    (folder / "driver.cpp").write_text(DRIVER)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.cpp"], cwd=folder, check=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text(NVCC)
    (folder / "bin" / "nvcc").chmod(0o755)

    def plan(gpus, every=False):
        code = f"import json, build; print(json.dumps(build.cuda_plan({every})))"
        variables = {"PYTHONPATH": str(ROOT / "csrc"), "LD_LIBRARY_PATH": str(folder), "CUDA_HOME": str(folder)}
        environment = os.environ | variables | {"GPUS": gpus, "TORCH_CUDA_ARCH_LIST": ""}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=True
        )
        return json.loads(result.stdout)

    return plan


def test_gpus_are_seen_without_torch(machine):
    assert machine("9.0 8.6 9.0") == [["8.6", "9.0"], None]


def test_a_gpu_newer_than_nvcc_gets_ptx_and_an_older_than_the_kernels_nothing(machine):
    assert machine("7.5 8.9") == [["8.6+PTX"], None]
    assert machine("9.5 8.0") == [["8.0", "9.0+PTX"], None]
    targets, reason = machine("7.0 7.5")
    assert targets == []
    assert reason.startswith("the GPUs seen here (7.0, 7.5) are older than 8.0")


def test_without_a_gpu_the_reason_says_how_to_ask(machine):
    targets, reason = machine("fault")
    assert targets == []
    assert reason == (
        "no GPU is seen here: libcuda.so.1: cuInit failed with error 100; ZIPFORMER_KERNELS_BUILD=cuda builds for all"
    )
    assert machine("")[1].startswith("no GPU is seen here: the driver shows none")
    assert machine("", every=True) == [["8.0", "9.0+PTX"], None]


def test_the_targets_can_be_narrowed(monkeypatch):
    build = build_module()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert build.listed_targets() == ("8.0", "9.0a", "12.0+PTX")
    assert build.gencode(build.listed_targets()) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: wanted capabilities such as .*got 'Hopper'"):
        build.listed_targets()


# ---- compiled for every GPU ----


@pytest.fixture(scope="module")
def every_target():
    """The compiled module, for all targets."""
    targets, reason = all_targets()
    if reason:
        pytest.skip(reason)
    return module_for_all_targets(), targets


def cuobjdump(module, *options):
    return subprocess.run([CUOBJDUMP, *options, module], capture_output=True, text=True, check=True).stdout


def test_imports_without_a_driver(every_target):
    """A process that hides every GPU still imports the module and runs on the CPU."""
    module, targets = every_target
    code = f"""
import torch, zipformer_kernels
from compiled import load
from zipformer_kernels.core import backend
backend.native = load("_all_targets", {str(module)!r})
backend.refresh()
print(zipformer_kernels.explain("swoosh", backend="cpu").splitlines()[0])
print(backend.native.build["cuda_targets"])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    chosen, built = result.stdout.splitlines()
    assert chosen == "swoosh: runs on 'cpu' (asked for: 'cpu')"
    assert tuple(built.split()) == targets


def test_needs_no_cuda_library(every_target):
    """cudart is linked in; the driver's library is opened by it when a GPU is first used."""
    result = subprocess.run(["ldd", every_target[0]], capture_output=True, text=True, check=True)
    assert "libcud" not in result.stdout
    assert "libtorch" not in result.stdout
    assert "libc10" not in result.stdout


def test_every_target_holds_the_same_kernels_and_none_spills(every_target):
    module, targets = every_target
    kernels = {}
    target = None
    for line in cuobjdump(module, "-res-usage").splitlines():
        if found := re.search(r"arch = sm_(\d+\w?)", line):
            target = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            kernels.setdefault(target, {})[name] = {"stack": int(found[2]), "local": int(found[4])}
    assert set(kernels) == {t.removesuffix("+PTX").replace(".", "") for t in targets}
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


def test_the_newest_target_carries_ptx_for_gpus_to_come(every_target):
    module, targets = every_target
    ptx = set(re.findall(r"sm_(\d+)\.ptx", cuobjdump(module, "--list-ptx")))
    assert ptx == {t.removesuffix("+PTX").replace(".", "") for t in targets if t.endswith("+PTX")}


# ---- machine code ----


@pytest.fixture(scope="module")
def kernels(every_target):
    """The instructions of every kernel for one target, by the kernel's name in C++."""
    module, targets = every_target
    target = next((t for t in targets if t.startswith("9.0")), targets[0]).removesuffix("+PTX").replace(".", "")
    code = cuobjdump(module, "-sass", "-arch", f"sm_{target}")
    code = subprocess.run(["c++filt"], input=code, capture_output=True, text=True, check=True).stdout
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    kernels = {}
    for line in code.splitlines():
        if name := re.match(r"\s*Function : (.*)", line):
            body = kernels[name[1].replace("zk::", "")] = []
        elif found := instruction.match(line):
            body.append(found[1])
    return kernels


def matching(kernels, pattern):
    found = {name: body for name, body in kernels.items() if re.search(pattern, name)}
    assert found, f"no kernel is named like {pattern}"
    return found


def accesses(body, *names):
    """The widths, as machine code writes them, of the instructions called `names`: loads or stores of global memory."""
    split = [op.split(".") for op in body]
    return [next((part for part in op if part in ("U8", "U16", "64", "128")), "32") for op in split if op[0] in names]


def test_packs_are_loaded_and_stored_16_bytes_at_a_time(kernels):
    """Of Swoosh and swoosh_linear, whose kernels have the elements of a pack as their last parameter."""
    for name, body in matching(kernels, r"<\(SwooshKind\)\d, .*\b[48]>\(").items():
        assert set(accesses(body, "LDG", "LD")) == {"128"}, name
        assert set(accesses(body, "STG", "ST")) == {"128"}, name


def test_rows_of_bias_norm_are_loaded_and_stored_16_bytes_at_a_time(kernels):
    """One store of 4 bytes is for the row's 1 / rms; the sums that backward leaves are single floats too."""
    for name, body in matching(kernels, r"forward_in_(registers|blocks)<\w+, \w+, [48]\b").items():
        assert accesses(body, "STG", "ST").count("32") == 1, name
    for name, body in matching(kernels, r"_in_(registers|blocks)<\w+, \w+, [48]\b").items():
        assert "128" in accesses(body, "STG", "ST"), name
        assert "U16" not in accesses(body, "STG", "ST", "LDG", "LD"), name


def test_no_element_waits_for_an_ieee_division(kernels):
    """It tests its operands (FCHK) and may call a subroutine. A row's, a tensor's or a block's division may."""
    for name, body in matching(kernels, r"SwooshKind|ConvModule|update_kernel").items():
        assert "FCHK" not in body, name
        if "backward_parameters" not in name:  # a block divides in 64 bits, to find its share
            assert not [op for op in body if op.startswith("CALL")], name
