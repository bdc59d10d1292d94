"""What is special to the gated averaging of NonlinAttention: the handle of weights, inference, stored weights."""

import pytest
import torch
from contract import TOLERANCE, relative
from draws import seed_all
from lanes import lanes
from test_attention import both_ways, storing
from tolerances import assert_agrees, assert_rounded, rounding

from zipformer_kernels.core.backend import missing
from zipformer_kernels.core.joint import side_by_side, split
from zipformer_kernels.modules import NonlinAttention
from zipformer_kernels.ops import nonlin_attention as package
from zipformer_kernels.ops.attention import AttentionWeights
from zipformer_kernels.ops.nonlin_attention import nonlin_attention
from zipformer_kernels.ops.nonlin_attention.cases import CASES
from zipformer_kernels.ops.nonlin_attention.gates import GatedLaunchers
from zipformer_kernels.ops.nonlin_attention.infer import infer_nonlin_attention

OP = package._op


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
def test_compiles_without_graph_breaks(lane):
    def layer(q, k, gate, x, y):
        return nonlin_attention(AttentionWeights(q, k)[0:1], gate, x, y)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    shapes = [(12, 2, 2, 8), (12, 2, 2, 8), (12, 2, 6), (12, 2, 6), (12, 2, 6)]
    inputs = [torch.randn(shape, device=lane.device, requires_grad=True) for shape in shapes]
    with lane.active():
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        expected = torch.autograd.grad(layer(*inputs).square().sum(), inputs)
    assert_agrees(got, expected, rounding(torch.float32, 12 * 8))


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


# ---- the gates alone ----

GATED = [name for name, own in OP.backends.items() if isinstance(own, GatedLaunchers)]


@pytest.mark.parametrize("channels", [1, 24, 37, 300])
@pytest.mark.parametrize("lane", lanes(OP, *(name for name in OP.backends if name not in GATED)))
def test_gates_of_any_layout(lane, channels):
    """Results and gradients, which are written between what must stay as it is."""
    gates = OP.backends[lane.backend].gates
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        base = (3 * torch.randn(3, 2, 3 * channels + 1, device=lane.device)).to(dtype)
        layouts = base[..., 1:], base[..., :-1].contiguous(), base.transpose(0, 1)[..., :-1]
        strided = torch.randn(3, 2, 6 * channels, device=lane.device).to(dtype)[..., ::2]
        for projected in (*layouts, strided):
            a, b, c = projected.chunk(3, dim=2)
            room = torch.full((*a.shape[:2], 5 * channels), 7.0, device=lane.device, dtype=dtype)
            ds, dx, dy = room.split(channels, dim=2)[1:4]
            values, again = a.new_empty(a.shape), torch.empty_like(ds)
            with lane.active():
                actual = gates.open_(b, a), gates.close(a, b), gates.close_backward(a, b, c, dy)
                gates.open_backward(a, b, c, ds, dx, values)
                gates.open_backward(a, b, c, again, torch.empty_like(dx), None)
            assert torch.equal(again, ds)
            a, b, c = (x.double() for x in (a, b, c))
            gate = b.tanh()
            wanted = a * gate, a * b, a * c, a * b, a * c * (1 - gate**2), a * gate, c * gate
            assert all(x.is_contiguous() for x in actual[:2])
            for i, (x, exact) in enumerate(zip((*actual, dy, ds, dx, values), wanted, strict=True)):
                assert x.dtype == dtype
                assert relative(x, exact) < TOLERANCE[dtype], i
            assert (room[..., :channels] == 7).all()
            assert (room[..., 4 * channels :] == 7).all()


@pytest.mark.parametrize("lane", lanes(OP, *(name for name in OP.backends if name not in GATED)))
def test_the_average_s_gradient_lies_as_the_average_does(lane):
    """So that the product of stored weights with it copies nothing."""
    grad, y, dy = (torch.randn(5, 2, 8, device=lane.device) for _ in range(3))
    average = torch.randn(2, 5, 8, device=lane.device).transpose(0, 1)
    with lane.active():
        inner = OP.backends[lane.backend].gates.close_backward(grad, average, y, dy)
    assert inner.stride() == average.stride()


# ---- in inference, with weights that are stored ----


def infer_arguments(frames, batch, heads, channels, dtype, bias=True):
    weights = torch.randn(heads, batch, frames, frames, dtype=dtype).softmax(dim=-1)
    width = 3 * heads * channels
    return torch.randn(frames, batch, width, dtype=dtype), torch.randn(width, dtype=dtype) if bias else None, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lane", lanes(OP.variants["infer"]))
def test_infer_matches_the_formula(lane, dtype):
    for frames, batch, heads, channels in ((1, 1, 1, 1), (7, 3, 1, 5), (40, 2, 1, 144), (33, 2, 3, 7)):
        for bias in (True, False):
            args = infer_arguments(frames, batch, heads, channels, dtype, bias)
            with lane.active():
                actual = infer_nonlin_attention(*args)
            expected = package.reference.infer(*(None if x is None else x.double() for x in args))
            assert actual.dtype == dtype
            assert_rounded(actual, expected, frames, f"{frames} frames, {heads} heads")


@pytest.mark.usefixtures("isa")
def test_infer_under_every_instruction_set():
    for dtype in (torch.float32, torch.float64):
        args = infer_arguments(21, 2, 1, 37, dtype)
        actual = infer_nonlin_attention(*args, backend="cpu")
        assert_rounded(actual, package.reference.infer(*(x.double() for x in args)), 21, str(dtype))


@pytest.mark.parametrize("lane", lanes(OP.variants["infer"]))
def test_infer_opcheck(lane):
    with lane.active():
        args = infer_arguments(5, 2, 1, 3, torch.float64)
        torch.library.opcheck(torch.ops.zipformer_kernels.nonlin_attention_infer.default, (*args, lane.backend))
        assert infer_nonlin_attention(*infer_arguments(0, 2, 1, 3, torch.float32)).shape == (0, 2, 3)


def test_infer_names_bad_input():
    projected, bias, weights = infer_arguments(5, 2, 1, 3, torch.float32)
    with pytest.raises(ValueError, match="projected must have a multiple of 3 channels"):
        infer_nonlin_attention(projected[..., 1:], bias, weights)
    with pytest.raises(ValueError, match=r"weights must have shape \(1, 2, 5, 5\), got \(1, 2, 5, 4\)"):
        infer_nonlin_attention(projected, bias, weights[..., 1:])
    with pytest.raises(ValueError, match=r"bias must have shape \(9,\), got \(8,\)"):
        infer_nonlin_attention(projected, bias[1:], weights)


# ---- in training, as one use that leaves its part of the weights' gradient ----


def needs_cpu():
    if missing["cpu"]:
        pytest.skip(missing["cpu"])


def stored_arguments(frames=13, batch=2, channels=7, dtype=torch.float64, heads=2):
    """q and k of some heads, and a projection to gates and values; leaves."""
    shapes = (frames, batch, heads, 8), (frames, batch, heads, 8), (frames, batch, 3 * channels)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def gate(q, k, projected, backend="cpu"):
    """The op on the first head, as the encoder's layers call it."""
    padding = torch.arange(len(q)) >= torch.linspace(len(q), 1, q.shape[1]).long().unsqueeze(1)
    weights = AttentionWeights(q, k, key_padding_mask=padding, backend=backend)
    return nonlin_attention(weights[0:1], *split(projected, [projected.shape[2] // 3] * 3))


def assert_gates_match_float64(args, grad=None):
    out = gate(*args)
    assert type(out.grad_fn).__name__ == "_GatedAverageBackward"
    grad = torch.randn_like(out) if grad is None else grad
    wide = [x.detach().double().requires_grad_() for x in args]
    expected = gate(*wide, backend="eager")
    wanted = torch.autograd.grad(expected, wide, grad.double())
    assert out.dtype == args[0].dtype
    assert relative(out, expected) < TOLERANCE[out.dtype]
    for name, actual, other in zip("qkp", torch.autograd.grad(out, args, grad), wanted, strict=True):
        assert relative(actual, other, floor=0.1) < 3 * TOLERANCE[out.dtype], name


@both_ways
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_use_matches_float64(dtype, stored):
    for frames, batch, channels in ((1, 1, 1), (13, 2, 7), (33, 3, 144), (70, 1, 37)):
        with storing(stored):
            assert_gates_match_float64(stored_arguments(frames, batch, channels, dtype))


@both_ways
def test_gradients_of_any_strides(stored):
    needs_cpu()
    shape = 13, 2, 7
    grads = {
        "expanded": torch.ones((), dtype=torch.float64).expand(shape),
        "one frame expanded": torch.randn(1, 2, 7, dtype=torch.float64).expand(shape),
        "channels expanded": torch.randn(13, 2, 1, dtype=torch.float64).expand(shape),
        "batch first": torch.randn(2, 13, 7, dtype=torch.float64).transpose(0, 1),
        "channels first": torch.randn(7, 2, 13, dtype=torch.float64).transpose(0, 2),
        "every second channel": torch.randn(13, 2, 14, dtype=torch.float64)[..., ::2],
    }
    for grad in grads.values():
        before = grad.clone()
        with storing(stored):
            assert_gates_match_float64(stored_arguments(), grad)
        assert torch.equal(grad, before)


@both_ways
def test_gradients_of_the_thirds_are_written_side_by_side(stored):
    needs_cpu()
    q, k, projected = stored_arguments()
    thirds = projected.detach().split([7] * 3, dim=2)
    thirds = [third.requires_grad_() for third in thirds]
    with storing(stored):
        out = nonlin_attention(AttentionWeights(q, k, backend="cpu")[0:1], *thirds)
    assert side_by_side(*torch.autograd.grad(out.sum(), thirds)) is not None


@both_ways
def test_when_one_function_serves(stored):
    needs_cpu()
    q, k, projected = stored_arguments(dtype=torch.float32)
    thirds = split(projected, [7] * 3)
    serves = package.deferred.serves
    with storing(stored):
        weights = AttentionWeights(q, k, backend="cpu")
        first = weights[0:1].held.pieces()
        assert serves(first, *thirds)
        assert serves(first, *thirds[::-1])
        assert serves(weights.held.pieces(), *thirds) is not stored  # stored, the first head lies apart
        assert serves(weights[0:1].constant().held.pieces(), *thirds)
        assert not serves(first, *(third.double() for third in thirds))
        assert not serves(AttentionWeights(q, k, backend="eager")[0:1].held.pieces(), *thirds)
        with torch.no_grad():
            assert serves(first, *thirds)
        with torch.autocast("cpu", torch.bfloat16):
            assert not serves(first, *thirds)
        q, k, projected = stored_arguments(dtype=torch.bfloat16)
        pieces = AttentionWeights(q, k, backend="cpu")[0:1].held.pieces()
        assert serves(pieces, *split(projected, [7] * 3))


@pytest.mark.parametrize("frozen", [(0, 1), (2,), (3,), (4,), (2, 3), (2, 3, 4)], ids=str)
@both_ways
def test_frozen_inputs(frozen, stored):
    """Of q, k and the thirds."""
    needs_cpu()
    q, k, projected = stored_arguments()
    parts = [x.detach() for x in (q, k, *projected.split([7] * 3, dim=2))]
    results = []
    for backend in ("cpu", "eager"):
        leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(parts)]
        with storing(stored):
            out = nonlin_attention(AttentionWeights(*leaves[:2], backend=backend)[0:1], *leaves[2:])
        results.append(torch.autograd.grad(out.square().sum(), [x for x in leaves if x.requires_grad]))
    for actual, expected in zip(*results, strict=True):
        assert relative(actual, expected) < 3 * TOLERANCE[torch.float64]


@both_ways
def test_gradients_of_gradients(stored):
    needs_cpu()
    args = stored_arguments(frames=4, batch=2, channels=2)
    with storing(stored):
        assert torch.autograd.gradcheck(gate, args)
        assert torch.autograd.gradgradcheck(gate, args)


@pytest.mark.parametrize("name", ["tanh", "identity1"])
def test_hooks_between_the_projections_are_called(name, monkeypatch):
    """Without them one function stands between the projections of the module."""
    needs_cpu()
    module, src = NonlinAttention(6, 4).double(), torch.randn(9, 2, 6, dtype=torch.float64)
    q, k, _ = stored_arguments(9)
    calls, kernels = [], []
    gated_average = package.deferred.gated_average
    monkeypatch.setattr(package.deferred, "gated_average", lambda *args: kernels.append(args) or gated_average(*args))
    results = []
    for hooked in (False, True):
        if hooked:
            getattr(module, name).register_forward_hook(lambda *args: calls.append(args))
        seed_all(0)  # the balancer draws
        y = module(src, AttentionWeights(q, k, backend="cpu")[0:1])
        assert (len(kernels), len(calls)) == (1, hooked)
        results.append([y, *torch.autograd.grad(y.square().sum(), [q, k, *module.parameters()])])
    for plain, other in zip(*results, strict=True):
        assert relative(other, plain, floor=0.1) < 3 * TOLERANCE[torch.float64]
