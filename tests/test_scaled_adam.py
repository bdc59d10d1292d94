"""ScaledAdam on its own: the formula by hand, groups and names, dtypes and strides, bad arguments."""

import copy
import weakref

import pytest
import torch
from optim_steps import (
    assert_same,
    full_speed,
    in_float64,
    make_params,
    once,
    run_on_lanes,  # noqa: F401
    set_grads,
    state_tensors,
    train,
)
from tolerances import relative_error

from zipformer_kernels.optim import ScaledAdam


@in_float64
def test_first_steps_by_hand():
    """One tensor, P = 2: its scale moves at the second and fourth step, by the last two sums of p g."""
    p0 = torch.tensor([3.0, -4.0], dtype=torch.float64)
    p = torch.nn.Parameter(p0.clone())
    optimizer = ScaledAdam([p], lr=0.01, size_update_period=2, param_max_rms=100.0)
    v = m = u = 0.0
    w, rms, sums = p0.clone(), (12.5) ** 0.5, {}
    for t in range(4):
        g = torch.tensor([1.0, 2.0], dtype=torch.float64) * (t + 1)
        p.grad = g.clone()
        optimizer.step()

        v = 0.98 * v + 0.02 * g**2
        sums[t % 2] = (w * g).sum()
        move = 0.0
        if t % 2 == 1:
            rms = w.square().mean().sqrt()
            u = 0.98**2 * u + (1 - 0.98**2) * (sums[0] ** 2 + sums[1] ** 2) / 2
            move = -0.01 * 0.1 * (1 - 0.98 ** (t + 1)) ** 0.5 * (sums[0] + sums[1]) / (u.sqrt() + 1e-8)
        d = -0.01 * rms * g / ((v / (1 - 0.98 ** (t + 1))).sqrt() + 1e-8) + move * w
        m = 0.9 * m + 0.1 * d
        w = w + m
        torch.testing.assert_close(p.detach(), w, rtol=1e-13, atol=0)
    assert (p - p0).abs().min() > 1e-3


@full_speed
def test_one_element_is_clamped_and_takes_small_steps():
    p = torch.nn.Parameter(torch.tensor([[9.9999]]))
    optimizer = ScaledAdam([p], lr=0.1)
    for _ in range(50):
        p.grad = torch.full_like(p, -3.0)
        optimizer.step()
    assert p.item() == 10.0
    for _ in range(100):
        p.grad = torch.full_like(p, 3.0)
        optimizer.step()
    assert 9.0 < p.item() < 9.5  # a hundred steps of lr / 10 at most, less what the momentum has to turn


@full_speed
def test_learns():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x = torch.randn(256, 8)
    y = x[:, :1] * x[:, 1:2]
    optimizer = ScaledAdam(model.parameters(), lr=0.03, clipping_scale=2.0)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    for _ in range(300):
        last = optimizer.step(closure).item()
    assert last < 0.2 * first


def test_every_form_of_params_trains_alike():
    def forms(params):
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        yield params
        yield (p for p in params)
        yield named
        yield iter(named)
        yield [named[0], *params[1:]]
        yield [{"params": params}]
        yield [{"params": named}]
        yield [{"named_params": iter(named)}]

    expected = make_params()
    train(ScaledAdam(expected), expected, 5)
    params = make_params()
    start = [p.detach().clone() for p in params]
    for form in forms(params):
        with torch.no_grad():
            for p, q in zip(params, start, strict=True):
                p.copy_(q)
        train(ScaledAdam(form), params, 5)
        assert_same(params, expected)


@once
def test_names_are_kept_and_made_up():
    a, b, c = make_params([(2,), (3,), (4,)])
    groups = [{"named_params": [("a", a)], "lr": 0.1}, {"params": b}]
    optimizer = ScaledAdam(groups)
    optimizer.add_param_group({"params": [("c", c)]})
    assert [group["param_names"] for group in optimizer.param_groups] == [["a"], ["1.0"], ["c"]]
    assert list(groups[0]) == ["named_params", "lr"], "the caller's groups stay as they are"


def test_empty_groups_are_passed_over():
    (p,) = make_params([(4,)])
    optimizer = ScaledAdam([{"params": []}])
    optimizer.step()
    optimizer.add_param_group({"params": p})
    before = p.detach().clone()
    train(optimizer, [p], 3)
    assert not torch.equal(p, before)


def test_added_group_trains_with_its_own_options():
    params = make_params([(4,), (5,)])
    optimizer = ScaledAdam(params[:1], lr=0.01)
    train(optimizer, params, 3)
    optimizer.add_param_group({"params": params[1:], "lr": 0.02})
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 6, start=3)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(params, before, strict=True))
    assert [d.steps for d in optimizer.diagnostics()] == [9, 6]

    twin = make_params([(4,), (5,)])[1:]
    ghost = make_params([(4,)])  # so that the gradients drawn are the same
    other = ScaledAdam(twin, lr=0.02)
    train(other, ghost + twin, 6, start=3)
    assert_same(twin, params[1:])


def test_learning_rate_as_a_tensor():
    numbers, tensors = make_params(), make_params()
    lr = torch.tensor(0.02)
    by_number, by_tensor = ScaledAdam(numbers, lr=0.02), ScaledAdam(tensors, lr=lr)
    for i in range(12):
        if i == 6:
            by_number.param_groups[0]["lr"] = 0.005
            lr.fill_(0.005)
        train(by_number, numbers, 1, start=i)
        train(by_tensor, tensors, 1, start=i)
    for p, q in zip(numbers, tensors, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=0)


def test_missing_gradients_count_as_zeros_and_momentum_goes_on():
    missing, zeros = make_params(), make_params()
    adams = ScaledAdam(missing, clipping_scale=2.0), ScaledAdam(zeros, clipping_scale=2.0)
    for params, adam in zip((missing, zeros), adams, strict=True):
        train(adam, params, 5)
    for p in missing:
        p.grad = None
        p.requires_grad_(False)
    set_grads(zeros, 0, value=0.0)
    before = [p.detach().clone() for p in missing]
    for adam in adams:
        adam.step()
    assert_same(missing, zeros)
    assert all(not torch.equal(p, q) for p, q in zip(missing, before, strict=True) if p.numel())
    for p in missing:
        p.requires_grad_(True)
    for params, adam in zip((missing, zeros), adams, strict=True):
        train(adam, params, 5)
    assert_same(missing, zeros)


def test_any_strides_of_parameters_and_gradients():
    plain = make_params([(6, 4), (2, 3, 4, 5), (8,)])
    strided = [
        torch.nn.Parameter(plain[0].detach().clone().t().contiguous().t()),
        torch.nn.Parameter(plain[1].detach().clone().to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.stack([plain[2].detach()] * 3, dim=1)[:, 1]),
    ]
    assert not any(p.is_contiguous() for p in strided)
    adams = ScaledAdam(plain), ScaledAdam(strided)
    for i in range(9):
        set_grads(plain, i)
        plain[2].grad = torch.full((8,), 0.1 * i + 0.1)
        strided[0].grad, strided[1].grad = plain[0].grad.clone(), plain[1].grad.clone()
        strided[2].grad = torch.tensor(0.1 * i + 0.1).expand(8)
        for adam in adams:
            adam.step()
    for p, q in zip(plain, strided, strict=True):
        assert relative_error(p, q) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_have_wide_state_and_are_rounded_once(dtype):
    half, wide = make_params(dtype=dtype), make_params()
    adams = ScaledAdam(half, clipping_scale=1.0), ScaledAdam(wide, clipping_scale=1.0)
    for i in range(10):
        set_grads(half, i)
        with torch.no_grad():
            for p, q in zip(half, wide, strict=True):
                q.copy_(p)
                q.grad = p.grad.float()
            if i == 0:
                before = [p.clone() for p in half]
        for adam in adams:
            adam.step()
        assert_same(half, [q.to(dtype) for q in wide])
    assert any(not torch.equal(p, q) for p, q in zip(half, before, strict=True))
    for x, y in zip(state_tensors(adams[0]), state_tensors(adams[1]), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no Tensor.grad_dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_of_wide_parameters(dtype):
    mixed, wide = make_params(), make_params()
    adams = ScaledAdam(mixed, clipping_scale=1.0), ScaledAdam(wide, clipping_scale=1.0)
    for i in range(15):
        set_grads(wide, i)
        for p, q in zip(mixed, wide, strict=True):
            q.grad = q.grad.to(dtype).float()
            p.grad = None
            p.grad_dtype = dtype
            p.grad = q.grad.to(dtype)
        for adam in adams:
            adam.step()
    assert_same(mixed, wide)


@in_float64
def test_mixed_dtypes_in_one_group():
    params = [make_params([(3, 4)], dtype)[0] for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = ScaledAdam(params, clipping_scale=2.0)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 15)
    for p, q, wide in zip(params, before, (torch.float32, torch.float64, torch.float32), strict=True):
        assert optimizer.state[p]["exp_avg_sq"].dtype == wide
        assert (p - q).abs().max() > 0.01


def test_gradients_are_not_kept_alive():
    params = make_params()
    optimizer = ScaledAdam(params)
    train(optimizer, params, 1)
    watched = weakref.ref(params[0].grad)
    optimizer.zero_grad()
    assert watched() is None


@once
@pytest.mark.parametrize(
    ("error", "message", "group"),
    [
        (
            TypeError,
            "floating-point tensors, got torch.complex64 for 'z'",
            {"params": [("z", torch.zeros(2) * 1j)]},
        ),
        (TypeError, "floating-point tensors, got torch.int64 for '0.0'", {"params": [torch.zeros(2).long()]}),
        (TypeError, "tensors, got float for '0.0'", {"params": [1.0]}),
        (TypeError, "fixed order, got a set", {"params": {torch.zeros(2)}}),
        (
            ValueError,
            r"'params' or 'named_params', got the keys \['named_params', 'params'\]",
            {"named_params": []},
        ),
        (ValueError, "as 'a' and as 'b'", {"params": [("a", (twice := torch.zeros(2))), ("b", twice)]}),
        (
            ValueError,
            "name each of the 1 parameters, got 2",
            {"params": torch.zeros(2), "param_names": ["a", "b"]},
        ),
        (ValueError, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)", {"betas": (0.9, 1.0)}),
        (ValueError, "lr must be at least 0, got -1", {"lr": -1}),
        (ValueError, r"one-element tensor, got shape \(2,\)", {"lr": torch.zeros(2)}),
        (ValueError, "clipping_scale must be None or positive, got 0", {"clipping_scale": 0}),
        (ValueError, "eps must be positive, got 0", {"eps": 0}),
        (ValueError, "scalar_max must be positive, got -1", {"scalar_max": -1}),
        (ValueError, "param_min_rms must be at least 0, got -1", {"param_min_rms": -1}),
        (ValueError, "size_update_period must be an integer of at least 1, got 0", {"size_update_period": 0}),
        (ValueError, "clipping_update_period must be an integer", {"clipping_update_period": 1.5}),
    ],
)
def test_bad_arguments(error, message, group):
    with pytest.raises(error, match=message):
        ScaledAdam([{"params": torch.zeros(2), **group}])


@once
def test_a_parameter_in_two_groups():
    (p,) = make_params([(2,)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        ScaledAdam([{"params": p}, {"params": p}])


def test_sparse_gradients_are_refused_before_anything_changes():
    params = make_params([(2,), (4, 3)])
    optimizer = ScaledAdam([("dense", params[0]), ("embedding", params[1])])
    train(optimizer, params, 2)
    params[1].grad = torch.ones(4, 3).to_sparse()
    before = copy.deepcopy((params, state_tensors(optimizer)))
    with pytest.raises(TypeError, match=r"gradient of 'embedding' must be dense, got torch.sparse_coo"):
        optimizer.step()
    assert_same((*params, *state_tensors(optimizer)), (*before[0], *before[1]))


@pytest.mark.parametrize("option", ["size_update_period", "clipping_update_period"])
def test_periods_are_fixed_once_stepped(option):
    params = make_params()
    optimizer = ScaledAdam(params)
    train(optimizer, params, 1)
    optimizer.param_groups[0][option] += 1
    with pytest.raises(ValueError, match=f"{option} is fixed"):
        optimizer.step()
