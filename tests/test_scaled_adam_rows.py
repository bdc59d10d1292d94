"""The look at all tensors before a step: compiled and in Python it finds the same."""

import numpy as np
import pytest
import torch
from torch import nn

from zipformer_kernels.core import backend
from zipformer_kernels.optim import rows

NATIVE = rows._EXCHANGE is not None and hasattr(backend.native, "AdamRows")
COMPILED = pytest.mark.skipif(not NATIVE, reason="the compiled module or torch's DLPack table is missing")
KINDS = ["python", pytest.param("native", marks=COMPILED)]
SHAPES = [(6, 4), (), (0, 3), (5, 1), (7,)]


@pytest.fixture(params=KINDS)
def made(request):
    """Rows, parameters and entries; every other parameter has a gradient."""
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for p in params[::2]:
        p.grad = torch.randn_like(p)
    entries = [{"rms": torch.zeros(()), **{name: torch.zeros_like(p) for name in rows.MOMENTS}} for p in params]
    made = rows.Rows(params, entries, True) if request.param == "python" else rows._NativeRows(params, entries)
    return made, params, entries


def test_nothing_changed(made):
    look, params = made[0].look(made[1]), made[1]
    assert look.odd == []
    assert all(g is p.grad for g, p in zip(look.grads, params, strict=True))
    wanted = [[p.data_ptr() for p in params], [0 if p.grad is None else p.grad.data_ptr() for p in params]]
    assert np.array_equal(look.places, wanted)
    params[0].data = params[0].data.clone()
    params[1].grad = torch.ones(())
    moved = made[0].look(params)
    assert moved.places[0, 0] == params[0].data_ptr() != look.places[0, 0]
    assert moved.places[1, 1] == params[1].grad.data_ptr()


def test_a_stride_of_an_axis_of_one_is_no_change(made):
    p = made[1][3]
    p.grad = torch.randn(5).as_strided((5, 1), (1, 9))
    look = made[0].look(made[1])
    assert look.odd in ([], [3])  # Python takes it for another, which costs a second look


def as_double(params, entries):
    params[0].data = params[0].data.double()


def reshaped(params, entries):
    params[0].data = params[0].data.view(4, 6)


def transposed(params, entries):
    params[0].data = params[0].data.view(4, 6).t()


def without_memory(params, entries):
    entries[4]["delta"].untyped_storage().resize_(0)


def exchanged_moment(params, entries):
    entries[4]["exp_avg_sq"].data = entries[4]["exp_avg_sq"].data.clone()


def replaced(params, entries):
    entries[2]["rms"] = entries[2]["rms"].clone()


def another_entry(params, entries):
    entries[2]["more"] = 1


def one_entry_less(params, entries):
    del entries[4]["rms"]


def another_parameter(params, entries):
    params[1] = nn.Parameter(params[1].data)


def one_parameter_less(params, entries):
    params.pop()


CHANGES = (
    as_double,
    reshaped,
    transposed,
    without_memory,
    exchanged_moment,
    replaced,
    another_entry,
    one_entry_less,
    another_parameter,
    one_parameter_less,
)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(made, change):
    look, params, entries = made
    assert look.look(list(params)) is not None
    given = list(params)
    change(given, entries)
    assert look.look(given) is None


def sparse(g):
    return g.to_sparse()


def transposed_gradient(g):
    return g.t().contiguous().t()


def negated(g):
    return torch._neg_view(g)


def without_storage(g):
    g.untyped_storage().resize_(0)
    return g


def of_a_subclass(g):
    return g.as_subclass(type("Tagged", (torch.Tensor,), {}))


@pytest.mark.parametrize("change", [sparse, transposed_gradient, negated, without_storage, of_a_subclass])
def test_odd_gradients(made, change):
    rows_, params, _ = made
    params[0].grad = change(params[0].grad.clone())
    look = rows_.look(params)
    assert look.odd == [0]
    assert look.places[1, 0] == 0
    assert look.places[1, 2] == params[2].grad.data_ptr()


@pytest.mark.parametrize("other", [torch.zeros(6, 4).half(), torch.zeros(2, 3)], ids=["half", "shape"])
def test_gradients_that_torch_lets_nobody_set(made, other):
    rows_, params, _ = made
    params[0].grad.data = other
    assert rows_.look(params).odd == [0]


def test_same_values():
    values = [object() for _ in range(5)]
    state = dict(enumerate(values))
    assert rows.same_values(state, values)
    assert not rows.same_values(state, values[:-1])
    state[2] = object()
    assert not rows.same_values(state, values)
    assert not rows.same_values({}, values)
