"""Attention weights as a dense tensor, stored on the CPU while it is small: values, gradients, masks, threads."""

import pytest
import torch
from lanes import lanes
from test_attention import TOLERANCE, relative, storing
from tolerances import assert_agrees, rounding

from zipformer_kernels.core import backend
from zipformer_kernels.ops import attention
from zipformer_kernels.ops.attention import AttentionWeights, StoredWeights
from zipformer_kernels.ops.attention.cases import CASES, padding, weights_inputs

OP = attention._op.variants["weights"]
SMALL = [case for case in CASES if not case.large]


def arguments(case, dtype):
    """The op's arguments from those of attention."""
    q, k, p, e, _, _, *rest = case.inputs(dtype, "cpu")
    return q, k, p, e, *rest


def exact(args, grad):
    """Weights and gradients in float64, from the differentiable reference."""
    wide = [x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    leaves = [x.requires_grad_() for x in wide[:4]]
    *_, penalty, limit = args
    w = attention.reference.weights(*wide)
    loss = (w * grad.double()).sum()
    if penalty:
        loss = loss + penalty * (attention.reference.scores(*leaves).abs() - limit).relu().sum()
    return w, torch.autograd.grad(loss, leaves)


def check(args, tolerance=None):
    w = OP(*args)
    grad = torch.randn_like(w)
    grads = torch.autograd.grad(w, args[:4], grad)
    expected, expected_grads = exact(args, grad)
    tolerance = tolerance or TOLERANCE[args[0].dtype]
    assert w.dtype == args[0].dtype
    assert relative(w, expected) < tolerance
    floor = 0.1 * grad.double().norm().item()  # a single source leaves scores without a gradient: only rounding
    for name, actual, wanted in zip("qkpe", grads, expected_grads, strict=True):
        assert relative(actual, wanted, floor) < 3 * tolerance, name
    return [w, *grads]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
@pytest.mark.parametrize("lane", lanes(OP))
def test_cases_match_float64(lane, case):
    for dtype in lane.dtypes:
        torch.manual_seed(0)
        with lane.active():
            check(arguments(case, dtype))


@pytest.mark.parametrize("lane", lanes(OP))
def test_long_chunked_sequences(lane):
    """Whole tiles are out of a target's sight, and some targets see only padding, so that all count for them."""
    torch.manual_seed(7)
    frames = 900 if lane.backend == "cpu" else 400
    hidden = torch.zeros(2, frames, dtype=torch.bool)
    hidden[1, 100:300] = True
    with lane.active():
        args = *weights_inputs(frames, frames, 2, 2, 8, 4, torch.float32, "cpu"), hidden, None, 50, 1, 0.0, 0.0
        w = check(args)[0]
    blind = w[:, 1, 150:300]
    assert torch.equal(blind, torch.full_like(blind, 1 / frames))
    assert (w[:, :, :50, 50:] == 0).all()


@pytest.mark.parametrize("lane", lanes(OP))
def test_low_scores_see_masked_sources(lane):
    """Where scores lie near the value of masked ones, those have weight, and no gradient."""
    torch.manual_seed(1)
    dtype = torch.float32 if lane.backend == "triton" else torch.float64
    rounding = 1000 * torch.finfo(dtype).eps  # of a score
    q, k, p, e = (x.detach() for x in weights_inputs(40, 40, 1, 1, 8, 4, dtype, "cpu"))
    q[..., 0], k[..., 0] = -1000.0, 1.0
    with lane.active():
        leaves = (x.requires_grad_() for x in (q, k, p, e))
        w, *_ = check((*leaves, torch.arange(40)[None] > 20, None, 8, 1, 0.0, 0.0), rounding)
    assert (w[0, 0, 0, 21:] > 0).all()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa):
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    before = backend.native.current_isa()
    try:
        backend.native.set_isa(isa)
    except ValueError:
        pytest.skip(f"a processor with {isa} would run this")
    try:
        for dtype in TOLERANCE:
            for targets, sources in ((1, 1), (45, 400), (33, 767), (64, 385)):
                torch.manual_seed(0)
                scores = weights_inputs(targets, sources, 2, 2, 19, 5, dtype, "cpu")
                with backend.use_backend("cpu"):
                    check((*scores, padding(2, sources, "cpu"), None, -1, -1, 0.01, 2.0))
    finally:
        backend.native.set_isa(before)


@pytest.mark.parametrize("lane", lanes(OP, "eager"))
def test_results_do_not_depend_on_the_threads(lane):
    threads, runs = torch.get_num_threads(), []
    try:
        with lane.active():
            for count in (1, 2, 5):
                torch.manual_seed(9)
                torch.set_num_threads(count)
                frames = 300 if lane.backend == "cpu" else 100
                scores = weights_inputs(frames, frames, 2, 2, 16, 4, torch.float32, "cpu")
                runs.append(check((*scores, None, None, -1, -1, 0.0, 0.0)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("lane", lanes(OP))
def test_only_wanted_gradients(lane):
    with lane.active():
        args = list(arguments(CASES[0], torch.float32))
        everything = torch.autograd.grad(OP(*args).square().sum(), args[:4])
        args[:4] = [x.detach() for x in args[:4]]
        for i in range(4):
            x = args[i].requires_grad_()
            (alone,) = torch.autograd.grad(OP(*args).square().sum(), x)
            args[i] = x.detach()
            assert_agrees(alone, everything[i], rounding(alone.dtype, len(args[1])))


@pytest.mark.parametrize("lane", lanes(OP))
def test_opcheck(lane):
    with lane.active():
        args = arguments(CASES[0], torch.float32)
        torch.library.opcheck(torch.ops.zipformer_kernels.attention_weights.default, (*args, lane.backend))


def test_gradients_of_gradients():
    with backend.use_backend("cpu"):
        if backend.missing["cpu"]:
            pytest.skip(backend.missing["cpu"])
        scores = weights_inputs(5, 5, 1, 2, 3, 2, torch.float64, "cpu")
        rest = padding(1, 5, "cpu"), None, 2, 1, 0.0, 0.0
        assert torch.autograd.gradcheck(lambda *scores: OP(*scores, *rest), scores)
        assert torch.autograd.gradgradcheck(lambda *scores: OP(*scores, *rest), scores)


def test_storing_changes_nothing_but_rounding():
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    results = []
    for stored in (True, False):
        torch.manual_seed(3)
        leaves = [*weights_inputs(120, 120, 2, 4, 16, 4, torch.float32, "cpu")]
        leaves += [torch.randn(120, 2, 48, requires_grad=True), torch.randn(120, 2, 48, requires_grad=True)]
        with backend.use_backend("cpu"), storing(stored):
            weights = AttentionWeights(*leaves[:4], padding(2, 120, "cpu"))
            assert isinstance(weights.held, StoredWeights) is stored
            first, middle = weights[0:1].aggregate(leaves[4]), weights[1:3].aggregate(leaves[5])
            out = first + middle + weights.aggregate(leaves[4] + leaves[5])
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < TOLERANCE[torch.float32]


def test_other_code_may_take_the_handle_for_the_tensor():
    """What upstream's modules, and people's own, do with the tensor that upstream hands them."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 2, 3, 4, dtype=torch.float64)
    handle = AttentionWeights(q, k)
    w = handle.materialize()
    uses = (
        lambda x: x * 0.9,
        lambda x: 0.9 * x - x / 2,
        lambda x: (x > 0.1).to(x.dtype),
        lambda x: x[0],
        lambda x: x[:, :, -1],
        lambda x: x.clone().unsqueeze(0).sum(dim=-1),
        lambda x: torch.matmul(x, torch.ones(5, 2, dtype=x.dtype)),
        lambda x: x.permute(1, 0, 2, 3).size(0) + len(x) + x.ndim,
        lambda x: x.masked_fill(x < 0.2, 0.0),
    )
    for number, use in enumerate(uses):
        actual, expected = use(handle), use(w)
        assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected)), number
    assert not hasattr(handle, "no_such_method")
