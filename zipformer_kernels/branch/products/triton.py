"""Matrix products of rows in Triton."""

from __future__ import annotations

from zipformer_kernels.branch.products.plain import BY_TORCH

TRITON = BY_TORCH._replace()
