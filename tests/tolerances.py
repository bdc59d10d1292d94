"""How far two computations of the same thing may lie apart: one table for all tests.

Errors are measured against the RMS of the expected tensor, for single elements of a sum that cancels may lose
all their digits and mean nothing by it.
"""

import math

import torch

# Ours against upstream: same maths, another order of operations. A chain of layers multiplies the epsilon
# (2e-16 and 1e-7) by a few hundred at most.
PARITY = {torch.float64: 1e-10, torch.float32: 1e-5}


def rounding(dtype, terms=1):
    """The error of a sum of `terms` products in `dtype`, relative to its RMS: 8 eps sqrt(terms).

    Rounding errors are independent, so they grow as the square root of their number; a deviation of 8 times
    the standard one is never seen.
    """
    return 8 * torch.finfo(dtype).eps * math.sqrt(terms)


def relative_error(actual, expected):
    """The largest error as a multiple of the RMS of `expected`; infinite for NaN, or wanting zeros."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max().item()
    if difference == 0.0:
        return 0.0
    rms = expected.detach().double().square().mean().sqrt().item()
    return difference / rms if rms > 0 and math.isfinite(difference) else math.inf


def assert_parity(actual, expected, tolerance, what):
    """Same presence, shape, dtype, and values within `tolerance` of the RMS of `expected`."""
    assert (actual is None) == (expected is None), f"{what}: got {actual}, wanted {expected}"
    if expected is None:
        return
    assert actual.shape == expected.shape, f"{what}: got shape {actual.shape}, wanted {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: got {actual.dtype}, wanted {expected.dtype}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{what}: got {actual}, wanted {expected}"
        return
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: off by {error:.1e} of the RMS, allowed {tolerance:.1e}"


def assert_agrees(actual, expected, tolerance):
    """`assert_parity` of two tensors, or of each of two sequences of tensors."""
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_parity(one, other, tolerance, f"result {i}")


def assert_rounded(actual, expected, terms, what, size=None):
    """`actual` is `expected`, in float64, but for the rounding of sums of `terms` terms and of its own dtype.

    The sums are taken in float32, or in float64 if the result is. Errors of theirs are measured against each
    element of `size` or its RMS, whichever is larger; `size` is `expected` by default: give it where the sums
    cancel. The result's own rounding is measured against each element.
    """
    assert actual.shape == expected.shape, f"{what}: got shape {actual.shape}, wanted {expected.shape}"
    if expected.numel() == 0:
        return
    expected = expected.detach().double().cpu()
    wide = torch.promote_types(actual.dtype, torch.float32)
    size = expected if size is None else size.detach().double().cpu()
    allowed = rounding(wide, terms) * size.abs().clamp(min=size.square().mean().sqrt())
    if actual.dtype != wide:
        own = torch.finfo(actual.dtype)
        allowed = allowed + own.eps * expected.abs() + own.smallest_normal * own.eps
    excess = ((actual.detach().double().cpu() - expected).abs() / allowed.clamp(min=1e-300)).max().item()
    assert excess <= 1, f"{what}: off by {excess:.2f} of what rounding explains"
