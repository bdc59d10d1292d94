"""A kernel that writes down which sequences a tile's rows belong to, for tests/test_products.py."""

import triton
import triton.language as tl

from zipformer_kernels.branch.products.kernels import sequence


@triton.jit
def sequences_kernel(out_ptr, m, B, ROWS: tl.constexpr):
    r = tl.arange(0, ROWS)
    tl.store(out_ptr + r, sequence(m, r, B))
