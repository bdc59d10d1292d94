"""In every test, memory that nobody wrote is no number by chance."""

import dataclasses

import pytest
import torch
from tolerances import assert_agrees, rounding

from zipformer_kernels.ops import swoosh


def uninitialised(x):
    """Tensors as launchers allocate them."""
    yield from (torch.empty(3, 4), torch.empty_like(x), torch.empty_like(x.t()), x.new_empty(5, 2))
    yield from (torch.empty_strided((2, 3), (1, 2)), x.new_empty(4, dtype=torch.float64))
    yield from (torch.empty(7, dtype=dtype) for dtype in (torch.float16, torch.bfloat16))


def test_uninitialised_memory_is_nan():
    assert all(made.isnan().all() for made in uninitialised(torch.ones(3, 4)))
    assert (torch.empty(5, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_a_kernel_that_leaves_an_element_unwritten_is_found(monkeypatch):
    launchers = swoosh._op.backends["eager"]

    def forgets_the_last(x, kind):
        y = torch.empty_like(x)
        y[:-1] = launchers.forward(x, kind)[0][:-1]
        return (y,)

    x = torch.randn(300)
    wanted = swoosh.swoosh_l(x, backend="eager")
    monkeypatch.setitem(swoosh._op.backends, "eager", dataclasses.replace(launchers, forward=forgets_the_last))
    with pytest.raises(AssertionError):
        assert_agrees(swoosh.swoosh_l(x, backend="eager"), wanted, rounding(x.dtype))
