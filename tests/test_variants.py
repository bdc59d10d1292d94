"""Variants of ops: each on all of its cases and on every backend that has it, against its reference in float64."""

import pytest
import torch
from lanes import lanes
from tolerances import rounding

from zipformer_kernels import explain, ops
from zipformer_kernels.core import backend
from zipformer_kernels.core.backend import BackendError
from zipformer_kernels.ops import attention

VARIANTS = [name for op in ops.names() for name in ops.variant_names(op)]
WITH_LANES = [(name, lane) for name in VARIANTS for lane in lanes(ops.get(name))]
NAME_AND_LANE = [pytest.param(name, *lane.values, id=f"{name}-{lane.id}") for name, lane in WITH_LANES]
NO_STREAMS = {"conv_module.infer": ("triton", "cuda")}
"""Backends that refuse cases of a stream."""
CASES = [
    pytest.param(name, *lane.values, case, id=f"{name}-{lane.id}-{case.name}")
    for name, lane in WITH_LANES
    for case in ops.cases_of(name)
    if not case.large and not ("stream" in case.name and lane.id in NO_STREAMS.get(name, ()))
]

# How many products go into an element, of all sums that follow on one another.
TERMS = {
    "attention.softmax": lambda q, k, p, *_: q.shape[3] + p.shape[3] + len(k),
    "attention.weights": lambda q, k, p, *_: q.shape[3] + p.shape[3] + len(q) + len(k),
    "attention.stream": lambda src, *rest: src.shape[2] + rest[2].shape[2] + rest[3].shape[3],
    "balancer.moments": lambda x, channel_dim: x.numel() // x.shape[channel_dim],
    "bias_norm.bypass": lambda x, *_: max(x.shape[-1], x.numel() // max(x.shape[-1], 1)),
    "bypass.scale": lambda *args: args[5],
    "bypass.limit": lambda *args: 1,
    "conv_module.infer": lambda *args: 2 * args[3].shape[2],
    "conv_module.stream": lambda src, *rest: 2 * src.shape[2] + 2 * rest[3].shape[2],
    "nonlin_attention.infer": lambda projected, bias, weights: weights.shape[3],
    "swoosh_linear.feed_forward": lambda src, weight, *_: src.shape[-1] + len(weight),
}
ROUNDINGS = 4  # of one element to half precision, in a row: a product, an activation or a weight, a sum, the result


def wide(args):
    """In float64 on the CPU; tensors that need gradients are leaves."""
    found = []
    for x in args:
        if isinstance(x, torch.Tensor):
            x = x.detach().cpu().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x.cpu()
        found.append(x)
    return found


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else results


def columns(name, results):
    """The results, apart where one holds numbers of several kinds."""
    return results[0].unbind(-1) if name == "attention.softmax" else results


def off(actual, expected):
    """The largest error, as a multiple of the expected element or of the RMS of all, whichever is larger."""
    if expected.numel() == 0:
        return 0.0
    size = expected.abs().clamp(min=max(expected.square().mean().sqrt().item(), 1e-300))  # zeros are exact
    return ((actual.detach().cpu().double() - expected).abs() / size).max().item()


def tolerance(name, args, dtype):
    """How far results may be off by rounding: of sums in float32 or better, and to half precision."""
    sums = rounding(torch.promote_types(dtype, torch.float32), max(TERMS[name](*args), 1))
    return sums if dtype in (torch.float32, torch.float64) else sums + rounding(dtype, ROUNDINGS)


def penalty(name, args):
    """A loss whose gradient the variant's brings, and its reference's does not."""
    if name != "attention.weights":
        return 0.0
    *_, penalty, limit = args
    return penalty * (attention.reference.scores(*args[:4]).abs() - limit).relu().sum()


def gradients(results, leaves, more=0.0):
    """Of the leaves, for fixed gradients of the results that differ from element to element."""
    loss = sum((x.double() * torch.linspace(-1, 1, x.numel(), dtype=torch.double).view(x.shape)).sum() for x in results)
    return torch.autograd.grad(loss + more, leaves)


def check(name, args, dtype):
    """Results and gradients on the backend asked for against those of the reference in float64."""
    op = ops.get(name)
    results = as_tuple(op(*args))
    exact = wide(args)
    expected = as_tuple(op.reference(*exact))
    bound = tolerance(name, args, dtype)
    for i, (actual, wanted) in enumerate(zip(columns(name, results), columns(name, expected), strict=True)):
        assert actual.shape == wanted.shape, f"result {i}"
        assert off(actual, wanted) <= bound, f"result {i}"
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    if leaves:
        others = [x for x in exact if isinstance(x, torch.Tensor) and x.requires_grad]
        found = gradients([x.cpu() for x in results], leaves)
        exact_ones = gradients(expected, others, penalty(name, exact))
        for i, (actual, wanted) in enumerate(zip(found, exact_ones, strict=True)):
            # Of one source the scores get no gradient: there is only rounding, of weights of 1.
            scale = max(wanted.norm().item(), max(results[0].numel(), 1) ** 0.5)
            assert (actual.cpu().double() - wanted).norm().item() / scale <= 3 * bound, f"gradient {i}"


@pytest.mark.parametrize(("name", "lane", "case"), CASES)
def test_cases_match_the_reference_in_float64(name, lane, case):
    ran = 0
    with lane.active():
        for dtype in lane.dtypes:
            torch.manual_seed(0)
            args = case.inputs(dtype, lane.device)
            if ops.get(name).unsupported(lane.backend, *args) is None:
                check(name, args, dtype)
                ran += 1
    assert ran >= 2


@pytest.mark.parametrize(("name", "lane"), NAME_AND_LANE)
def test_inputs_are_not_written_to_and_results_repeat(name, lane):
    with lane.active(), torch.no_grad():
        args = ops.example(name, device=lane.device)
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        first, second = (as_tuple(ops.get(name)(*args)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for x, copy in zip(args, before, strict=True):
        assert not isinstance(x, torch.Tensor) or torch.equal(x, copy)


@pytest.mark.parametrize(("name", "lane"), NAME_AND_LANE)
def test_opcheck(name, lane):
    with lane.active():
        operator = getattr(torch.ops.zipformer_kernels, ops.get(name).name).default
        torch.library.opcheck(operator, (*ops.example(name, device=lane.device), lane.backend))


@pytest.mark.parametrize(("name", "lane"), [p for p in NAME_AND_LANE if p.values[1].backend != "eager"])
def test_a_dtype_that_no_kernel_takes_is_refused(name, lane):
    first, *rest = ops.example(name, device=lane.device)
    args = first.detach().to(torch.float8_e4m3fn), *rest
    with lane.active(), pytest.raises(BackendError, match=rf"{ops.get(name).name}: backend '{lane.backend}' cannot"):
        ops.get(name)(*args)
    assert ops.get(name).select("auto", *args) == "eager"


def test_every_variant_has_cases():
    """Awkward ones, and large ones for benchmarks; and every backend's launchers are those of a variant."""
    assert set(TERMS) == set(VARIANTS)
    for name in VARIANTS:
        op, cases = ops.get(name), ops.cases_of(name)
        assert op.when
        assert "eager" in op.backends
        assert {case.large for case in cases} == {True, False}, name
        assert len({case.name for case in cases}) == len(cases), name
        for case in cases:
            assert case.bytes(4).keys() == case.flops.keys() >= {"forward"}, case.name
            assert case.bytes(2)["forward"] > 0, case.name
            has_backward = op.backends["eager"].backward is not None
            assert ("backward" in case.flops) == has_backward == bool(op.saved), case.name
    for name in ops.names():
        for launchers in ops.get(name).backends.values():
            assert set(getattr(launchers, "variants", ())) <= set(ops.get(name).variants)


def test_variants_are_found_by_name():
    assert ops.get("conv_module.stream") is ops.get("conv_module").variants["stream"]
    with pytest.raises(ValueError, match="variant of conv_module must be one of infer, stream, got 'streams'"):
        ops.get("conv_module.streams")
    with pytest.raises(ValueError, match="variant of swoosh must be one of none, got 'infer'"):
        ops.cases_of("swoosh.infer")
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'convolution'"):
        explain("convolution.stream")


def test_explain_tells_of_variants():
    lines = explain("conv_module").splitlines()[1 + len(backend.BACKENDS) :]
    assert [line.split(":")[0].strip() for line in lines] == [
        f"variant {name!r} on {', '.join(ops.get('conv_module').variants[name].backends)}"
        for name in ("infer", "stream")
    ]
    assert explain("conv_module.stream").startswith("conv_module_stream: runs on ")
    assert explain("attention.softmax", backend="eager").startswith("attention_softmax: runs on 'eager'")
