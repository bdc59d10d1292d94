"""A Triton kernel that tells where `find_chunk` of ScaledAdam's kernels finds a chunk."""

import triton
import triton.language as tl

from zipformer_kernels.ops.scaled_adam.triton import find_chunk


@triton.jit
def find_kernel(words, out, tensors, index, CHUNK: tl.constexpr):
    """Stores the tensor's number, the chunk's first element, and its end."""
    _, tensor, begin, end = find_chunk(words, tensors, index.to(tl.int64), CHUNK)
    tl.store(out, tensor)
    tl.store(out + 1, begin)
    tl.store(out + 2, end)
