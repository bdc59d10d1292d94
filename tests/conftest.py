"""Settings of the whole test run: Triton interpreted where there is no GPU, and reproducible generated tests.

``pytest --gpu`` runs only what uses a GPU: tests on lanes ``triton`` and ``cuda``, and those marked ``gpu``. Of them
the group ``large`` takes tens of gigabytes each: with several workers, ``--dist loadgroup`` runs them one by one.
"""

import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # where benchmarks/ is; last, for the package may be elsewhere

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the package is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it; read when CUDA starts

from hypothesis import settings
from interpreter import mend_bfloat16_dot, mend_bfloat16_rounding, quicken
from lanes import ISAS, instruction_set
from poison import poison_memory

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts jobs in the background so, and they their own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # but some tests interrupt what they start

torch.backends.cudnn.allow_tf32 = False  # what ours is compared with is float32

settings.register_profile("project", deadline=None, derandomize=True, max_examples=25, print_blob=True)
settings.load_profile("project")

if os.environ.get("TRITON_INTERPRET") == "1":
    mend_bfloat16_dot()
    mend_bfloat16_rounding()
    quicken()


pytest.register_assert_rewrite("contract")


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once for each instruction set of the CPU kernels; its name."""
    with instruction_set(request.param):
        yield request.param


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="only the tests that use a GPU")


def pytest_ignore_collect(collection_path, config):
    """With --gpu files that never use one are not even imported: what they need may be missing on such a machine."""
    if config.getoption("--gpu") and collection_path.name.startswith("test_"):
        text = collection_path.read_text()
        return not any(
            name in text for name in ("import lanes", "from lanes", "small_layer", "optim_steps", "mark.gpu")
        )
    return None


def pytest_configure(config):
    if config.getoption("--gpu"):
        config.pluginmanager.register(FailuresAtOnce())


class FailuresAtOnce:
    """Says what failed when it fails: a run may be cut off before its summary."""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            last = (report.longreprtext.splitlines() or ["no message"])[-1]
            print(f"\nFAILED {report.nodeid}: {last}", flush=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--gpu"):
        config.hook.pytest_deselected(items=[item for item in items if not uses_gpu(item)])
        items[:] = filter(uses_gpu, items)


def uses_gpu(item):
    """Whether a test runs on a GPU where there is one."""
    lane = item.callspec.params.get("lane") if hasattr(item, "callspec") else None
    return getattr(lane, "backend", lane) in ("triton", "cuda") or item.get_closest_marker("gpu") is not None


def pytest_runtest_setup(item):
    """A test draws the same numbers alone and among others, and no memory is zero by chance."""
    marker = item.get_closest_marker("gpu")
    if marker is not None and not torch.cuda.is_available():
        pytest.skip(f"a GPU would run this: {marker.args[0]}")
    poison_memory()  # again: a test may have switched it off
    random.seed(0)
    torch.manual_seed(0)
