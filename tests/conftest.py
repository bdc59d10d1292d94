"""Settings of the whole test run: Triton interpreted where there is no GPU, and reproducible generated tests."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the package is imported

from hypothesis import settings
from interpreter import mend_bfloat16_dot, mend_bfloat16_rounding, quicken

settings.register_profile("project", deadline=None, derandomize=True, max_examples=25, print_blob=True)
settings.load_profile("project")

if os.environ.get("TRITON_INTERPRET") == "1":
    mend_bfloat16_dot()
    mend_bfloat16_rounding()
    quicken()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    """Runs a test once for each instruction set of the CPU kernels; its name."""
    from zipformer_kernels import backend

    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    native, before = backend.native, backend.native.current_isa()
    try:
        native.set_isa(request.param)
    except ValueError:
        pytest.skip(f"a processor with {request.param} would run this")
    yield request.param
    native.set_isa(before)


def pytest_runtest_setup(item):
    """A test draws the same numbers alone and among others."""
    random.seed(0)
    torch.manual_seed(0)
