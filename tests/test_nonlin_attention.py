"""The gated averaging of NonlinAttention on every lane against float64."""

import pytest
import torch
from lanes import lanes
from tolerances import assert_rounded

from zipformer_kernels import use_backend
from zipformer_kernels.ops import nonlin_attention as package
from zipformer_kernels.ops.attention import AttentionWeights
from zipformer_kernels.ops.nonlin_attention import infer, nonlin_attention
from zipformer_kernels.ops.nonlin_attention.cases import CASES

OP = package._op
SMALL = [case for case in CASES if not case.large]

# As for attention (tests/test_attention.py): the gates add a few roundings of their own.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
NAMES = ("q", "k", "p", "e", "gate", "x", "y")


def relative(actual, expected, floor=1e-12):
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.isfinite(actual).all()
    return ((actual - expected).norm() / max(expected.norm().item(), floor)).item()


def exact(args, grad):
    """Output and gradients in float64, from the differentiable reference."""
    wide = [x.detach().double().cpu() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    wide = [x.cpu() if torch.is_tensor(x) else x for x in wide]
    leaves = [x.requires_grad_() for x in wide[:7]]
    out = package.reference.nonlin_attention(*wide)
    return out, torch.autograd.grad(out, leaves, grad.double().cpu())


def check(case, dtype, device):
    """A case on the backend in use, forward and backward, against float64."""
    torch.manual_seed(0)
    args = case.inputs(dtype, device)
    out = OP(*args)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, args[:7], grad)
    expected, expected_grads = exact(args, grad)
    assert out.dtype == dtype
    assert relative(out, expected) < TOLERANCE[dtype]
    floor = 0.1 * grad.double().norm().item()
    for name, actual, wanted in zip(NAMES, grads, expected_grads, strict=True):
        assert relative(actual, wanted, floor) < 3 * TOLERANCE[dtype], name


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
@pytest.mark.parametrize("lane", lanes(OP))
def test_cases_match_float64(lane, case):
    for dtype in lane.dtypes:
        with lane.active():
            check(case, dtype, lane.device)


@pytest.mark.usefixtures("isa")
def test_every_instruction_set_agrees():
    for case in SMALL:
        for dtype in TOLERANCE:
            with use_backend("cpu"):
                check(case, dtype, "cpu")


@pytest.mark.parametrize("lane", lanes(OP))
def test_strided_expanded_and_frozen_inputs(lane):
    torch.manual_seed(1)
    q, k = (torch.randn(19, 2, 1, 16, device=lane.device) for _ in range(2))
    gate = torch.randn(2, 19, 30, device=lane.device).transpose(0, 1).requires_grad_()
    x = torch.randn(19, 2, 60, device=lane.device)[..., ::2].requires_grad_()
    y = torch.randn(19, 2, 30, device=lane.device)
    grad = torch.randn(1, device=lane.device).expand(19, 2, 30)
    with lane.active():
        out = nonlin_attention(AttentionWeights(q, k), gate, x, y)
        grads = torch.autograd.grad(out, (gate, x), grad)
    wide = [t.detach().double().cpu() for t in (q, k, gate, x, y)]
    leaves = [t.requires_grad_() for t in wide[2:4]]
    weights = (wide[0].permute(2, 1, 0, 3) @ wide[1].permute(2, 1, 3, 0)).softmax(-1)[0]
    expected = torch.einsum("bij,jbc->ibc", weights, leaves[1] * leaves[0].tanh()) * wide[4]
    wanted = torch.autograd.grad(expected, leaves, grad.double().cpu())
    for actual, reference in zip((out, *grads), (expected, *wanted), strict=True):
        assert relative(actual, reference) < 1e-5


@pytest.mark.parametrize("lane", lanes(OP))
def test_opcheck(lane):
    with lane.active():
        args = CASES[0].inputs(torch.float32, lane.device)
        torch.library.opcheck(torch.ops.zipformer_kernels.nonlin_attention.default, (*args, lane.backend))


@pytest.mark.parametrize("lane", lanes(OP))
def test_compiles_without_graph_breaks(lane):
    def layer(q, k, gate, x, y):
        return nonlin_attention(AttentionWeights(q, k)[0:1], gate, x, y)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    shapes = [(12, 2, 2, 8), (12, 2, 2, 8), (12, 2, 6), (12, 2, 6), (12, 2, 6)]
    inputs = [torch.randn(shape, device=lane.device, requires_grad=True) for shape in shapes]
    with lane.active():
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        expected = torch.autograd.grad(layer(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lane", lanes(OP, "eager"))
def test_results_repeat_bit_for_bit(lane):
    with lane.active():
        args = CASES[0].inputs(torch.float32, lane.device)
        runs = []
        for _ in range(2):
            out = OP(*args)
            runs.append([out, *torch.autograd.grad(out.sum(), args[:7])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bad_input_is_named():
    weights = AttentionWeights(torch.randn(5, 2, 1, 8), torch.randn(5, 2, 1, 8))
    good, short = torch.randn(5, 2, 6), torch.randn(4, 2, 6)
    with pytest.raises(ValueError, match="gate must be"):
        nonlin_attention(weights, short, good, good)
    with pytest.raises(ValueError, match="y must be"):
        nonlin_attention(weights, good, good, short)
    longer = AttentionWeights(torch.randn(5, 2, 1, 8), torch.randn(9, 2, 1, 8))
    with pytest.raises(ValueError, match="as many sources as targets, got 9 and 5"):
        nonlin_attention(longer, good, good, good)


# ---- in inference, with weights that are kept ----


def infer_arguments(frames, batch, heads, channels, dtype, bias=True):
    weights = torch.randn(heads, batch, frames, frames, dtype=dtype).softmax(dim=-1)
    width = 3 * heads * channels
    return torch.randn(frames, batch, width, dtype=dtype), torch.randn(width, dtype=dtype) if bias else None, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lane", lanes(infer.op))
def test_infer_matches_the_formula(lane, dtype):
    for frames, batch, heads, channels in ((1, 1, 1, 1), (7, 3, 1, 5), (40, 2, 1, 144), (33, 2, 3, 7)):
        for bias in (True, False):
            args = infer_arguments(frames, batch, heads, channels, dtype, bias)
            with lane.active():
                actual = infer.infer_nonlin_attention(*args)
            expected = infer.infer(*(None if x is None else x.double() for x in args))
            assert actual.dtype == dtype
            assert_rounded(actual, expected, frames, f"{frames} frames, {heads} heads")


@pytest.mark.usefixtures("isa")
def test_infer_under_every_instruction_set():
    for dtype in (torch.float32, torch.float64):
        args = infer_arguments(21, 2, 1, 37, dtype)
        actual = infer.infer_nonlin_attention(*args, backend="cpu")
        assert_rounded(actual, infer.infer(*(x.double() for x in args)), 21, str(dtype))


@pytest.mark.parametrize("lane", lanes(infer.op))
def test_infer_opcheck(lane):
    with lane.active():
        args = infer_arguments(5, 2, 1, 3, torch.float64)
        torch.library.opcheck(torch.ops.zipformer_kernels.nonlin_attention_infer.default, (*args, lane.backend))
        assert infer.infer_nonlin_attention(*infer_arguments(0, 2, 1, 3, torch.float32)).shape == (0, 2, 3)


def test_infer_names_bad_input():
    projected, bias, weights = infer_arguments(5, 2, 1, 3, torch.float32)
    with pytest.raises(ValueError, match="projected must have a multiple of 3 channels"):
        infer.infer_nonlin_attention(projected[..., 1:], bias, weights)
    with pytest.raises(ValueError, match=r"weights must have shape \(1, 2, 5, 5\), got \(1, 2, 5, 4\)"):
        infer.infer_nonlin_attention(projected, bias, weights[..., 1:])
    with pytest.raises(ValueError, match=r"bias must have shape \(9,\), got \(8,\)"):
        infer.infer_nonlin_attention(projected, bias[1:], weights)
