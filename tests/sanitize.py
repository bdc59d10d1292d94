"""Runs the tests of the CPU kernels on a module that is compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

``python tests/sanitize.py -n 2``: arguments go to pytest. A wrong access or undefined behaviour ends the test process
with a report, and so the run with an error. First a read past the end of a tensor must be caught.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from compiled import SUFFIX, build_module

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "sanitize"
PACKAGE = WORK / "zipformer_kernels"
TESTS = (
    *(
        "contract",
        "swoosh",
        "swoosh_linear",
        "bias_norm",
        "attention",
        "attention_weights",
        "nonlin_attention",
        "conv_module",
    ),
    *("conv_module_infer", "depthwise_conv2d", "bypass", "balancer", "stream_kernels", "scaled_adam_kernels"),
)
READS_PAST_THE_END = """
import torch, zipformer_kernels
from zipformer_kernels.core import backend
from zipformer_kernels.core.launch import DTYPE_CODES
x = torch.zeros(1000)
y = torch.zeros(100000)
backend.native.swoosh_forward_cpu(x.data_ptr(), y.data_ptr(), 100000, DTYPE_CODES[x.dtype], 0, 1)
"""


def sanitized_package() -> None:
    """Lays out the package in build/, by links, around a compiled module of its own."""
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "zipformer_kernels").iterdir():
        link = PACKAGE / path.name
        if not path.name.startswith(("_native", "_build", "__pycache__")) and not link.exists():
            link.symlink_to(path)
    record = {"requested": "cpu", "not_built": {"cpu": None, "cuda": "this build is for the sanitizers"}}
    (PACKAGE / "_build.json").write_text(json.dumps(record))
    build_module().build(PACKAGE / f"_native{SUFFIX}", WORK / "objects", sanitize=True)


def environment() -> dict[str, str]:
    """The environment of processes that import that module."""
    compiler = shlex.split(build_module().cxx())
    libraries = [
        subprocess.run([*compiler, f"-print-file-name={name}.so"], capture_output=True, text=True, check=True)
        for name in ("libasan", "libubsan")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(found.stdout.strip() for found in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the process ends
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{WORK}{os.pathsep}{ROOT / 'tests'}",
    }


def main() -> int:
    sanitized_package()
    # In that folder, for Python looks into the current one first.
    there = {"env": environment(), "cwd": WORK}
    wrong = subprocess.run([sys.executable, "-c", READS_PAST_THE_END], **there, capture_output=True, text=True)
    if "heap-buffer-overflow" not in wrong.stderr:
        print(f"a read past the end was not caught:\n{wrong.stderr}", file=sys.stderr)
        return 1
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    chosen = ["-k", "not triton and not cuda and not compile and not opcheck", "-p", "no:cacheprovider"]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *chosen, *sys.argv[1:], *tests], **there).returncode


if __name__ == "__main__":
    sys.exit(main())
