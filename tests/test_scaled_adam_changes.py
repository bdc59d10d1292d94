"""Parameters that change between steps: the state follows as upstream's does, or an error names the parameter."""

import itertools

import pytest
import torch
import upstream
from draws import seed_all
from test_plain_tensors import Scaled, Tagged
from torch import nn

from zipformer_kernels import BackendError, use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.optim import ScaledAdam
from zipformer_kernels.optim.memory import check_memory

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


NAMES = ("w0", "w1", "w2")


def stepped(name, steps=5):
    """Three parameters of one shape and their optimizer, some steps on."""
    seed_all(0)
    params = [nn.Parameter(torch.randn(6, 4)) for _ in NAMES]
    optimizer = ScaledAdam(list(zip(NAMES, params, strict=True)), lr=0.03, clipping_scale=2.0)
    with use_backend(name):
        for i in range(steps):
            step(optimizer, params, i)
    return optimizer, params


def step(optimizer, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def into_one_buffer(params, optimizer):
    buffer = torch.cat([p.detach().reshape(-1) for p in params])
    for p, part in zip(params, buffer.split(24), strict=True):
        p.data = part.view(6, 4)


def into_columns(params, optimizer):
    columns = torch.stack([p.detach() for p in params], dim=2)
    for p, column in zip(params, columns.unbind(2), strict=True):
        p.data = column


def frozen(params, optimizer):
    for p in params:
        p.requires_grad_(False)


def assigned_state(params, optimizer):
    for entry in optimizer.state.values():
        entry.update({key: x.clone() for key, x in entry.items()})


def exchanged_state(params, optimizer):
    for entry in optimizer.state.values():
        for x in entry.values():
            x.data = x.data.double()


def reversed_group(params, optimizer):
    group = optimizer.param_groups[0]
    group["params"].reverse()
    group["param_names"].reverse()


def added_group(params, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3))]})


def copied_state_in_inference_mode(params, optimizer):
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())


SAME = [
    into_one_buffer,
    into_columns,
    frozen,
    assigned_state,
    exchanged_state,
    reversed_group,
    added_group,
    copied_state_in_inference_mode,
]


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("change", SAME)
def test_changes_that_change_no_number(change, name):
    """Twice, for what a step has looked at once must be looked at again."""
    (optimizer, params), (undisturbed, expected) = stepped(name), stepped(name)
    with use_backend(name):
        for seed in (5, 6):
            change(params, optimizer)
            step(optimizer, params, seed)
            step(undisturbed, expected, seed)
    for p, q in zip(params, expected, strict=True):
        assert (p - q).norm() <= 4 * torch.finfo(torch.float32).eps * q.norm()


def tied(params, optimizer):
    params[1].data = params[0].data


def overlapping(params, optimizer):
    buffer = torch.randn(40)
    params[0].data, params[1].data = buffer[:24].view(6, 4), buffer[16:].view(6, 4)


def expanded(params, optimizer):
    params[1].data = torch.randn(1, 4).expand(6, 4)


def without_memory(params, optimizer):
    params[1].untyped_storage().resize_(0)


def with_too_little_memory(params, optimizer):
    params[1].untyped_storage().resize_(8)


def flattened(params, optimizer):
    params[1].data = params[1].data.view(-1)
    params[1].grad = None


def complex_numbers(params, optimizer):
    params[1].data = params[1].data + 0j
    params[1].grad = None


def gradient_without_memory(params, optimizer):
    params[1].grad.untyped_storage().resize_(0)


def sparse_gradient(params, optimizer):
    params[1].grad = params[1].grad.to_sparse()


def gradient_of_another_shape(params, optimizer):
    params[1].grad.data = torch.randn(3)


def gradient_of_integers(params, optimizer):
    params[1].grad.data = torch.ones(6, 4, dtype=torch.int64)


def state_without_memory(params, optimizer):
    optimizer.state[params[1]]["delta"].untyped_storage().resize_(0)


def too_few_parameters(params, optimizer):
    optimizer.param_groups[0]["params"].pop()


REFUSED = {
    tied: "parameter 'w0' and parameter 'w1' must lie apart",
    overlapping: "parameter 'w0' and parameter 'w1' must lie apart",
    expanded: "parameter 'w1' must have each element in a place of its own",
    without_memory: "parameter 'w1' must lie within its storage: it needs 96 bytes, got 0",
    with_too_little_memory: "parameter 'w1' must lie within its storage: it needs 96 bytes, got 8",
    flattened: r"parameter 'w1' must have the shape \(6, 4\) of its exp_avg_sq, got \(24,\)",
    complex_numbers: "floating-point tensors, got torch.complex64 for 'w1'",
    gradient_without_memory: "gradient of 'w1' must lie within its storage",
    sparse_gradient: "gradient of 'w1' must be dense, got torch.sparse_coo",
    gradient_of_another_shape: r"gradient of 'w1' must have shape \(6, 4\), got \(3,\)",
    gradient_of_integers: "gradient of 'w1' must be a real floating-point tensor, got torch.int64",
    state_without_memory: "delta of parameter 'w1' must lie within its storage",
    too_few_parameters: "name each of the 2 parameters, got 3 names",
}


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_stepped_is_refused_by_name(change, name):
    optimizer, params = stepped(name)
    others = [p.detach().clone() for p in (params[0], params[2])]
    change(params, optimizer)
    with use_backend(name):
        for _ in range(2):  # and refused again
            with pytest.raises((ValueError, TypeError), match=REFUSED[change]):
                optimizer.step()
    if change is not overlapping:
        assert all(torch.equal(p, q) for p, q in zip((params[0], params[2]), others, strict=True))


def half_gradient(g):
    return g.half()


def tagged(g):
    return g.as_subclass(Tagged)


def held_in_another_form(g):
    return Scaled(8 * g, torch.tensor(0.125))


def negated_twice(g):
    return torch._neg_view(-g)


@pytest.mark.parametrize("name", ["eager", "auto"])
@pytest.mark.parametrize("other", [half_gradient, tagged, held_in_another_form, negated_twice])
def test_gradients_of_other_kinds(other, name):
    (optimizer, params), (plain, expected) = stepped(name), stepped(name)
    for seed in (5, 6):
        g = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).half().float()
        for p, q in zip(params, expected, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        if other is half_gradient:
            params[1].grad.data = other(g)
        else:
            params[1].grad = other(g)
        with use_backend(name):
            optimizer.step()
            plain.step()
    for p, q in zip(params, expected, strict=True):
        assert (p - q).norm() <= 4 * torch.finfo(torch.float32).eps * q.norm()


@pytest.mark.parametrize("name", ["eager", "auto"])
def test_a_parameter_becomes_of_another_class(name):
    (optimizer, params), (plain, expected) = stepped(name), stepped(name)
    torch.utils.swap_tensors(params[1], nn.Parameter(tagged(params[1].detach().clone())))
    assert type(params[1]) is Tagged
    with use_backend(name):
        step(optimizer, params, 5)
        step(plain, expected, 5)
    for p, q in zip(params, expected, strict=True):
        assert (p - q).norm() <= 4 * torch.finfo(torch.float32).eps * q.norm()


@pytest.mark.skipif("cpu" not in LANES, reason="the compiled module was not built")
def test_a_backend_asked_for_says_why_it_cannot():
    optimizer, params = stepped("cpu")
    params[1].grad = held_in_another_form(params[1].grad)
    with use_backend("cpu"), pytest.raises(BackendError, match=r"plain tensors of one device, got a .*Scaled"):
        optimizer.step()


@pytest.mark.parametrize("name", LANES)
def test_the_first_parameter_of_a_group_leaves_it(name):
    """Under it stands what is of the group: its count of steps and its norms go on."""
    optimizer, params = stepped(name)
    optimizer.param_groups[0]["params"].pop(0)
    optimizer.param_groups[0]["param_names"].pop(0)
    with use_backend(name):
        step(optimizer, params, 5)
    assert [d.steps for d in optimizer.diagnostics()] == [6]


@pytest.mark.parametrize("name", LANES)
def test_state_that_is_cleared_begins_anew(name):
    optimizer, params = stepped(name)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = ScaledAdam(list(zip(NAMES, twins, strict=True)), lr=0.03, clipping_scale=2.0)
    optimizer.state.clear()
    with use_backend(name):
        for seed in (5, 6):
            step(optimizer, params, seed)
            step(fresh, twins, seed)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("name", LANES)
def test_parameters_that_a_module_has_no_more(name):
    """`load_state_dict(assign=True)` gives a module new parameters: the optimizer steps those that it was given."""
    seed_all(0)
    module = nn.Linear(4, 3)
    optimizer = ScaledAdam(module.named_parameters(), lr=0.03)
    with use_backend(name):
        step(optimizer, list(module.parameters()), 0)
        old = module.weight
        module.load_state_dict({key: x.double() for key, x in module.state_dict().items()}, assign=True)
        module(torch.randn(2, 4).double()).sum().backward()
        before, new = old.detach().clone(), module.weight.detach().clone()
        optimizer.step()
    assert module.weight is not old
    assert torch.equal(module.weight, new)
    assert not torch.equal(old, before)


def test_columns_and_parts_of_one_buffer_lie_apart():
    matrix, buffer = torch.randn(6, 4), torch.randn(100)
    names = list("abcd")
    check_memory(matrix.unbind(1), names)
    check_memory([matrix[::2], matrix[1::2]], names[:2])
    check_memory([buffer[3:4], buffer.as_strided((2,), (6,)), buffer[7:]], names[:3])
    check_memory([buffer.unfold(0, 4, 4), matrix.t(), buffer[:0], buffer[:0]], names)
    for apart in ([matrix[:, :2], matrix[:, 1:]], [buffer[50:], buffer[:51]], [buffer, buffer[3::7]]):
        with pytest.raises(ValueError, match="must lie apart"):
            check_memory(apart, names[:2])
    with pytest.raises(ValueError, match="a must have each element in a place of its own"):
        check_memory([buffer.unfold(0, 4, 2)], names[:1])
