"""Settings of the whole test run: Triton interpreted where there is no GPU, and reproducible generated tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the package is imported

from hypothesis import settings
from interpreter import mend_bfloat16_dot, mend_bfloat16_rounding

settings.register_profile("project", deadline=None, derandomize=True, max_examples=25, print_blob=True)
settings.load_profile("project")

if os.environ.get("TRITON_INTERPRET") == "1":
    mend_bfloat16_dot()
    mend_bfloat16_rounding()
