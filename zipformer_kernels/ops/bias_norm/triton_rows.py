"""In Triton, the inverse RMS of rows that a program holds."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rescaling(mean):
    """A factor, 2^100 or 2^-100, that brings squares into float32's range where their mean is not; else 1."""
    return tl.where(mean < 1e-30, 1.2676506e30, tl.where(mean > 1e30, 7.8886091e-31, 1.0))


@triton.jit
def inverse_rms(d, C):
    """1 / rms of each row of d, (rows, channels), whose elements beyond C channels are 0."""
    scale = rescaling(tl.sum(d * d, 1) / C)
    d = d * scale[:, None]
    return scale * tl.rsqrt(tl.sum(d * d, 1) / C)
