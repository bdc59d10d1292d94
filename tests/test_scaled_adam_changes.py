"""Parameters that change between steps: the state follows as upstream's does, or an error names the parameter."""

import itertools

import pytest
import torch
import upstream
from parity import seed_all
from torch import nn

from zipformer_kernels import backend, use_backend
from zipformer_kernels.optim import ScaledAdam

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LANES = [name for name in ("eager", "cpu") if backend.missing[name] is None]


def converted(p, dtype):
    p.data = p.data.to(dtype)


def moved_in_memory(p, dtype):
    p.data = p.data.clone()


def transposed_in_memory(p, dtype):
    p.data = p.data.t().contiguous().t()


def trained(kind, change, before, after, name):
    seed_all(0)
    p = nn.Parameter(torch.randn(24, 7).to(before))
    optimizer = kind([("w", p)] if kind is ScaledAdam else [{"named_params": [("w", p)]}], lr=0.03)
    with use_backend(name):
        for i in range(6):
            if i == 3:
                change(p, after)
                p.grad = None
            p.grad = torch.randn(24, 7, generator=torch.Generator().manual_seed(i)).to(p.dtype)
            optimizer.step()
    return p.detach()


@pytest.mark.parametrize("name", [*LANES, "auto"])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(DTYPES, 2)), ids=str)
def test_another_dtype_between_steps(before, after, name):
    actual = trained(ScaledAdam, converted, before, after, name)
    expected = trained(upstream.optim.ScaledAdam, converted, before, after, name)
    assert actual.dtype == expected.dtype == after
    # Upstream keeps state in the parameter's dtype, ours in float32 or better: they part by its rounding, in 6 steps.
    eps = max(torch.finfo(dtype).eps for dtype in (before, after, torch.float32))
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= 4 * eps


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("change", [moved_in_memory, transposed_in_memory])
def test_another_place_or_other_strides_between_steps(change, name):
    actual = trained(ScaledAdam, change, torch.float32, None, name)
    expected = trained(ScaledAdam, lambda p, dtype: None, torch.float32, None, name)
    assert (actual - expected).norm() <= 4 * torch.finfo(torch.float32).eps * expected.norm()


@pytest.mark.parametrize("name", LANES)
def test_another_shape_is_refused_by_name(name):
    p = nn.Parameter(torch.randn(6))
    optimizer = ScaledAdam([("encoder.weight", p)], lr=0.03)
    with use_backend(name):
        p.grad = torch.randn(6)
        optimizer.step()
        p.data = torch.randn(9)
        p.grad = torch.randn(9)
        with pytest.raises(ValueError, match=r"'encoder.weight' must have the shape \(6,\).*got \(9,\)"):
            optimizer.step()
