"""States of ScaledAdam in other hands: other orders, names, dtypes and wrappers; upstream's of several ages; what is no
state of it."""

import copy

import pytest
import torch
import upstream
from optim_steps import SHAPES, assert_same, make_params, set_grads, state_tensors
from test_scaled_adam_upstream import upstream_in

from zipformer_kernels import use_backend
from zipformer_kernels.optim import ScaledAdam, upstream_state_dict

NAMES = [f"layer{i}.weight" for i in range(len(SHAPES))]


@pytest.fixture(autouse=True)
def best_backend():
    with use_backend("auto"):
        yield


def groups_of(params, names=NAMES, order=None, swapped=False):
    """Two named groups with options of their own, as `get_parameter_groups_with_lrs` makes them."""
    pairs = list(zip(names, params, strict=True))
    first, second = pairs[:3], pairs[3:]
    if order is not None:
        first, second = (sorted(pairs, key=lambda pair: order(pair[0])) for pairs in (first, second))
    groups = [{"named_params": first, "lr": 0.02}, {"named_params": second, "lr": 0.04}]
    return groups[::-1] if swapped else groups


def trained(steps, params=None, **options):
    params = make_params() if params is None else params
    optimizer = ScaledAdam(groups_of(params), clipping_scale=1.0, **options)
    steps_of(optimizer, params, range(steps))
    return optimizer, params


def steps_of(optimizer, params, steps):
    for i in steps:
        set_grads(params, i)
        optimizer.step()


def copies(params, dtype=None):
    return [torch.nn.Parameter(p.detach().to(dtype or p.dtype).clone()) for p in params]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_names_decide_where_the_order_is_another(wrapper, swapped):
    """Those of equal shapes would go unseen to one another."""
    optimizer, params = trained(12, make_params([(3, 5), (3, 5), (), (7,), (7,), (7,)]))
    again = copies(params)
    names = [wrapper + name for name in NAMES]
    other = ScaledAdam(groups_of(again, names, order=lambda name: -int(name.split("layer")[1][0]), swapped=swapped))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert sorted(group["lr"] for group in other.param_groups) == [0.02, 0.04]
    assert [group["lr"] for group in other.param_groups] == ([0.04, 0.02] if swapped else [0.02, 0.04])
    assert all(name.startswith(wrapper) for group in other.param_groups for name in group["param_names"])
    steps_of(optimizer, params, range(12, 20))
    steps_of(other, again, range(12, 20))
    for p, q in zip(params, again, strict=True):  # sums over a group's tensors are taken in another order
        assert p.numel() == 0 or (p - q).abs().max() <= 2e-6 * p.abs().max()


def test_without_names_the_order_decides():
    optimizer, params = trained(5)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["param_names"]
    again = copies(params)
    other = ScaledAdam(groups_of(again, [f"renamed{i}" for i in range(len(SHAPES))]))
    other.load_state_dict(state)
    steps_of(optimizer, params, range(5, 9))
    steps_of(other, again, range(5, 9))
    assert_same(again, params)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            lambda params: groups_of(params, [f"renamed{i}" for i in range(len(SHAPES))]),
            "must have a parameter 'renamed0', got 'layer0.weight'.* and 1 more .*their order decides",
        ),
        (
            lambda params: [(name, p) for name, p in zip(NAMES, params, strict=True)],
            r"groups of sizes \[6\], got \[3, 3\]",
        ),
        (
            lambda params: [
                groups_of(params)[0],
                {"named_params": [*groups_of(params)[1]["named_params"][:2], ("x", make_params()[4])]},
            ],
            "a parameter 'x'",
        ),
        (
            lambda params: [
                {"named_params": groups_of(params)[0]["named_params"][:2] + groups_of(params)[1]["named_params"][:1]},
                {"named_params": groups_of(params)[0]["named_params"][2:] + groups_of(params)[1]["named_params"][1:]},
            ],
            r"the 3 parameters of group 0 in a group of their own, got them in groups of sizes \[3, 3\]",
        ),
        (lambda params: groups_of(params)[:1], r"groups of sizes \[3\], got \[3, 3\]"),
        (
            lambda params: groups_of([torch.nn.Parameter(torch.zeros(2, *p.shape)) for p in params]),
            "exp_avg_sq of shape",
        ),
        (lambda params: groups_of(params[::-1]), r"exp_avg_sq of shape \(1,\) for 'layer0.weight', got \(3, 5\)"),
    ],
    ids=["names", "one group", "a name", "other groups", "a group less", "shapes", "names of other shapes"],
)
def test_what_does_not_fit_is_refused(groups, message):
    optimizer, params = trained(3)
    other = ScaledAdam(groups(copies(params)))
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_a_state_of_another_optimizer_is_refused():
    params = make_params()
    adam = torch.optim.Adam(params)
    set_grads(params, 0)
    adam.step()
    with pytest.raises(
        ValueError, match=r"must hold delta for '0.0', got the keys \['exp_avg', 'exp_avg_sq', 'step'\]"
    ):
        ScaledAdam(params).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_of_another_dtype_are_cast(dtype):
    optimizer, params = trained(6)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry.update({name: x.to(dtype) for name, x in entry.items() if x.is_floating_point()})
    other = ScaledAdam(groups_of(again := copies(params)))
    other.load_state_dict(state)
    steps_of(other, again, [6])
    assert {x.dtype for x in state_tensors(other)} == {torch.float32, torch.int64}
    steps_of(optimizer, params, [6])
    for p, q in zip(params, again, strict=True):
        assert (
            p.numel() == 0
            or (p - q).norm() <= 4 * torch.finfo(torch.promote_types(dtype, torch.bfloat16)).eps * p.norm()
        )


def upstream_trained(steps, params):
    theirs = upstream.optim.ScaledAdam(groups_of(params), clipping_scale=1.0)
    theirs.show_dominant_parameters = False
    steps_of(theirs, params, range(steps))
    return theirs


@pytest.mark.parametrize("named", [True, False])
def test_upstream_state_is_taken_as_it_is(named):
    with upstream_in(torch.float32):
        theirs = upstream_trained(23, params := make_params())
        again = copies(params)
        ours = ScaledAdam(groups_of(again) if named else [{"params": again[:3]}, {"params": again[3:]}])
        ours.load_state_dict(theirs.state_dict())
        assert [group["lr"] for group in ours.param_groups] == [0.02, 0.04]
        steps_of(theirs, params, range(23, 50))
        steps_of(ours, again, range(23, 50))
        for p, q in zip(params, again, strict=True):
            assert p.numel() == 0 or (p - q).abs().max() <= 2e-6 * p.abs().max()

        back = copies(again)
        theirs_again = upstream.optim.ScaledAdam(groups_of(back))
        theirs_again.show_dominant_parameters = False
        theirs_again.load_state_dict(upstream_state_dict(ours))
        steps_of(ours, again, range(50, 60))
        steps_of(theirs_again, back, range(50, 60))
    for p, q in zip(again, back, strict=True):
        assert p.numel() == 0 or (p - q).abs().max() <= 2e-6 * p.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_upstream_state_of_parameters_that_were_float32(dtype):
    """Stacks go by dtype and shape: those of a model that has been converted since are found all the same."""
    params = make_params()
    with upstream_in(torch.float32):
        theirs = upstream_trained(4, params)
    again = copies(params)
    again[4].data = again[4].data.to(dtype)  # one dtype among others sorts stacks anew
    ours = ScaledAdam(groups_of(again))
    ours.load_state_dict(theirs.state_dict())
    index = theirs.state_dict()["param_groups"][1]["params"][1]
    assert torch.equal(ours.state[again[4]]["delta"], theirs.state_dict()["state"][index]["delta"][0])


def test_old_upstream_states():
    """State had the parameters' dtype, parameters of one element statistics too, and a threshold no count beside it."""
    params = make_params()
    with upstream_in(torch.float32):
        theirs = upstream_trained(12, params)
    old = copy.deepcopy(theirs.state_dict())
    for entry in old["state"].values():
        entry.pop("num_clipped", None)
        entry.setdefault("param_rms", torch.ones(len(entry["delta"])))
        entry.setdefault("scale_grads", torch.zeros(4, len(entry["delta"])))
        entry.setdefault("scale_exp_avg_sq", torch.zeros(len(entry["delta"])))
        entry.update({name: x.half() for name, x in entry.items() if torch.is_tensor(x)})
    ours = ScaledAdam(groups_of(again := copies(params)))
    ours.load_state_dict(old)
    new = ScaledAdam(groups_of(others := copies(params)))
    new.load_state_dict(theirs.state_dict())
    steps_of(ours, again, [12])
    steps_of(new, others, [12])
    for p, q in zip(again, others, strict=True):
        assert p.numel() == 0 or (p - q).norm() <= 4 * torch.finfo(torch.float16).eps * p.norm()


def test_names_as_older_recipes_give_them():
    params = make_params()
    optimizer = ScaledAdam(iter(params), lr=0.02, clipping_scale=2.0, parameters_names=[NAMES])
    assert optimizer.param_groups[0]["param_names"] == NAMES
    with pytest.raises(ValueError, match="names for 1 groups, got 2"):
        ScaledAdam(params, parameters_names=[NAMES, NAMES])
    with pytest.raises(ValueError, match="name each of the 6 parameters, got 2 names"):
        ScaledAdam(params, parameters_names=[NAMES[:2]])
