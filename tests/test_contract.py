"""Every op keeps `contract.py`, on every lane."""

import pytest
import torch
from contract import (
    LAYOUTS,
    NAMES,
    contract,
    expanded,
    frozen,
    laid_out,
    leaves,
    relative,
    run,
    subsets,
    turned,
    ways,
    wide,
)
from lanes import instruction_set, lanes
from tolerances import assert_agrees, rounding

from zipformer_kernels.core import backend

SMALL = [(name, case) for name in NAMES for case in contract(name).cases]
every_op = pytest.mark.parametrize(
    ("name", "lane"),
    [pytest.param(name, *lane.values, id=f"{name}-{lane.id}") for name in NAMES for lane in lanes(contract(name).op)],
)


@pytest.mark.parametrize(
    ("name", "case", "lane", "isa"),
    [
        pytest.param(name, case, *way.values, id=f"{name}-{case.name}-{way.id}")
        for name, case in SMALL
        for way in ways(contract(name).op)
    ],
)
def test_cases_match_float64(name, case, lane, isa):
    for dtype in lane.dtypes:
        torch.manual_seed(0)
        with instruction_set(isa), lane.active():
            args = case.inputs(dtype, lane.device)
            contract(name).check(args, lane)


@every_op
def test_any_layout_of_arguments_and_gradients(name, lane):
    """Nothing is written but results."""
    its = contract(name)
    for case in its.extremes:
        with lane.active():
            args = case.inputs(torch.float32, lane.device)
            shape = its.call(args).shape
        gradients = [
            torch.randn(1, device=lane.device).expand(shape),
            torch.randn(shape[-1], device=lane.device).expand(shape),
            turned(torch.randn(shape))[1].to(lane.device).normal_(),
        ]
        for layout, dy in zip(LAYOUTS.values(), gradients, strict=True):
            given, blocks = laid_out(args, layout)
            before = [block.clone() for block in blocks]
            its.check(given, lane, dy)
            assert all(map(torch.equal, blocks, before))
        for dim in () if its.takes_what_it_computed else (0, 1):
            its.check(expanded(args, dim), lane)


@every_op
def test_frozen_arguments_get_no_gradient(name, lane):
    its = contract(name)
    torch.manual_seed(0)
    with lane.active():
        args = its.kinds[0].inputs(torch.float32, lane.device)
    for wanted in subsets(leaves(args)):
        y, _, _ = its.check(frozen(args, wanted), lane)
        assert y.requires_grad == bool(wanted)


@every_op
def test_a_result_used_twice_adds_and_the_same_call_gives_the_same_bits(name, lane):
    its = contract(name)
    torch.manual_seed(0)
    with lane.active():
        args = its.kinds[0].inputs(torch.float32, lane.device)
        y, dy, once = run(its.call, args)
        used = its.call(args)
        total = (used * dy).sum() + (2 * used * dy).sum()
        twice = torch.autograd.grad(total, [args[i] for i in once])
        assert_agrees(twice, [3 * grad for grad in once.values()], rounding(dy.dtype, dy.numel()))
        if lane.backend != "eager":
            again, _, grads = run(its.call, args, dy)
            assert all(map(torch.equal, (again, *grads.values()), (y, *once.values())))


@every_op
def test_gradients_have_gradients(name, lane):
    """Those of the reference: by kernels they have none."""
    its = contract(name)
    dtype = torch.float64 if torch.float64 in lane.dtypes else torch.float32
    torch.manual_seed(0)
    with lane.active():
        args = its.kinds[0].inputs(dtype, lane.device)

    def second(call, args, dy, directions):
        dy = dy.requires_grad_()
        inputs = [args[i] for i in leaves(args)]
        grads = torch.autograd.grad(call(args), inputs, dy, create_graph=True)
        loss = sum((grad * direction).sum() for grad, direction in zip(grads, directions, strict=True))
        return torch.autograd.grad(loss, (dy, *inputs), materialize_grads=True, allow_unused=True)

    directions = [torch.randn_like(args[i]) for i in leaves(args)]
    with lane.active():
        dy = torch.randn_like(its.call(args))
        actual = second(its.call, args, dy, directions)
    exact = wide(args), dy.detach().double().cpu(), [x.double().cpu() for x in directions]
    expected = second(lambda args: its.op.reference(*args), *exact)
    size = torch.stack([x.norm() for x in expected]).norm().item()
    for one, other in zip(actual, expected, strict=True):
        assert relative(one, other, size / len(expected)) <= rounding(dtype, dy.numel())


@pytest.mark.parametrize("name", [name for name in NAMES if not contract(name).takes_what_it_computed])
@pytest.mark.parametrize("where", [name for name in ("eager", "cpu") if backend.missing[name] is None])
def test_gradcheck(name, where):
    its = contract(name)
    if where not in its.op.backends:
        pytest.skip(f"{name} has no {where} kernels")
    for case in its.extremes:
        args = case.inputs(torch.float64, "cpu")
        wanted = leaves(args)

        def function(*tensors, args=args, wanted=wanted):
            given = dict(zip(wanted, tensors, strict=True))
            return its.call([given.get(i, x) for i, x in enumerate(args)])

        with backend.use_backend(where):
            inputs = [args[i] for i in wanted]
            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@every_op
def test_opcheck(name, lane):
    its = contract(name)
    with lane.active():
        samples = [case.inputs(torch.float32, lane.device) for case in its.kinds]
        samples += [frozen(samples[0], []), laid_out(samples[0], turned)[0]]
        for args in samples:
            torch.library.opcheck(its.operator, (*args, lane.backend))


def strides(x):
    """Of the dimensions that have more than one element: those of others say nothing."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@every_op
def test_compiles_without_graph_breaks(name, lane):
    """And gives what it gives called, laid out alike, on one kind of arguments after the other.

    On eager the compiler sees the reference itself, whose gradients have no penalty in them.
    """
    its = contract(name)
    called = its.call if lane.backend != "eager" else lambda args: its.op.reference(*args)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: its.call(args), fullgraph=True, backend="aot_eager")
    with lane.active():
        for case in its.kinds:
            args = case.inputs(torch.float32, lane.device)
            y, dy, grads = run(lambda args: compiled(*args), args)
            wanted, _, expected = run(called, args, dy)
            assert strides(y) == strides(wanted)
            assert_agrees((y, *grads.values()), (wanted, *expected.values()), rounding(y.dtype, dy.numel()))


@every_op
def test_autocast(name, lane):
    """The dtypes that eager gives, or a reason why not; gradients in those of the arguments."""
    its = contract(name)
    with lane.active():
        args = its.kinds[0].inputs(torch.float32, lane.device)
        with torch.autocast(lane.device.type, torch.bfloat16):
            with backend.use_backend("eager"):
                wanted = its.call(args)
            try:
                y, dy, grads = run(its.call, args)
            except backend.BackendError:  # it says why: a test of the op holds what
                return
    assert y.dtype == wanted.dtype
    assert all(grad.dtype == args[i].dtype for i, grad in grads.items())
    exact, _, expected = run(lambda args: its.op.reference(*args), wide(args), dy.double().cpu())
    floor = 0.1 * dy.double().norm().item()
    for one, other in zip((y, *grads.values()), (exact, *expected.values()), strict=True):
        assert relative(one, other, floor) <= rounding(torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in NAMES if not contract(name).takes_what_it_computed])
def test_bad_input_is_named(name):
    its = contract(name)
    args = frozen(its.kinds[0].inputs(torch.float32, "cpu"), [])
    for i in its.op.tensors:
        argument = rf"\w*{its.names[i]}\w*"

        def raises(error, match, value, i=i):
            with pytest.raises(error, match=match):
                its.call([value if j == i else x for j, x in enumerate(args)])

        raises(TypeError, f"{argument} must be a tensor.*, got list", [1.0])
        if args[i].is_floating_point():
            raises(TypeError, rf"{argument} must be floating-point, got torch\.int64", args[i].long())
        if i > 0:
            raises(ValueError, f"{argument} must be on the device of .*, cpu, got meta", args[i].to("meta"))
