"""How a handle holds attention weights on every backend: one backward for all uses, what is small enough to store."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from lanes import lanes
from test_attention import OP, TOLERANCE, both_ways, relative, storing
from tolerances import assert_agrees, rounding

from zipformer_kernels.core import backend, tuning
from zipformer_kernels.core.joint import side_by_side, split
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.modules import RelPositionMultiheadAttentionWeights
from zipformer_kernels.ops import nonlin_attention as package
from zipformer_kernels.ops.attention import AttentionWeights, ChunkMask, RecomputedWeights, StoredWeights, budget
from zipformer_kernels.ops.attention.cases import padding, weights_inputs
from zipformer_kernels.ops.attention.launchers import AttentionLaunchers
from zipformer_kernels.ops.attention.scores import Scores
from zipformer_kernels.ops.nonlin_attention import nonlin_attention

FRAMES, BATCH, HEADS = 37, 2, 3
IN_PARTS = [name for name, own in OP.backends.items() if isinstance(own, AttentionLaunchers)]
in_parts = pytest.mark.parametrize("lane", lanes(OP, *(name for name in OP.backends if name not in IN_PARTS)))


def leaves(dtype=torch.float32, device="cpu"):
    """q, k, p, e, values of all heads twice, and a projection for the first head."""
    torch.manual_seed(0)
    scores = weights_inputs(FRAMES, FRAMES, BATCH, HEADS, 16, 4, dtype, "cpu")
    widths = 12 * HEADS, 12 * HEADS, 3 * 20
    tensors = *scores, *(torch.randn(FRAMES, BATCH, width) for width in widths)
    return [x.detach().to(device, dtype).requires_grad_() for x in tensors]


def layer(q, k, p, e, first, second, projected, penalty=0.0, **options):
    """NonlinAttention and two self-attentions."""
    hidden = padding(BATCH, FRAMES, q.device)
    weights = AttentionWeights(q, k, p, e, hidden, ChunkMask(9, 2), penalty, 1.0, **options)
    gated = nonlin_attention(weights[0:1], *split(projected, [20] * 3))
    return gated, weights.aggregate(first), weights.aggregate(second)


def gradients(outs, tensors):
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    return torch.autograd.grad(outs, tensors, grads)


@pytest.fixture
def counted(monkeypatch):
    """Counts calls of the parts of a backend's launchers: for a name of one, a list of names in order."""

    def count(name):
        calls, own = [], OP.backends[name]

        def counting(part):
            launch = getattr(own, part)
            return lambda *args: calls.append(part) or launch(*args)

        parts = [one.name for one in fields(AttentionLaunchers) if one not in fields(Launchers)]
        parts = {part: counting(part) for part in (*parts, "backward") if getattr(own, part) is not None}
        monkeypatch.setitem(OP.backends, name, replace(own, **parts))
        return calls

    return count


@both_ways
@in_parts
def test_one_backward_serves_all_uses(lane, stored, counted):
    with lane.active(), storing(stored):
        calls = counted(lane.backend)
        stored = stored and OP.backends[lane.backend].make_weights is not None
        tensors = leaves(device=lane.device)
        outs = layer(*tensors, penalty=0.5)
        made = calls[:]
        calls.clear()
        gradients(outs, tensors)
    if stored:
        assert made == ["make_weights"] * (2 if lane.backend == "cpu" else 1)
        assert calls == ["weights_gradients"]
    else:
        gated = "average_values" if OP.backends[lane.backend].gated_average is None else "gated_average"
        assert made == [gated, "average_values", "average_values"]
        assert calls == ["values_gradient"] * 3 + ["scores_gradients"]


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@in_parts
def test_all_uses_match_float64(lane, stored, dtype):
    tensors = leaves(dtype, lane.device)
    wide = [x.detach().double().cpu().requires_grad_() for x in tensors]
    with lane.active(), storing(stored):
        outs = layer(*tensors, penalty=0.5)
        found = gradients(outs, tensors)
    expected = layer(*wide, penalty=0.5, backend="eager")
    for actual, wanted in zip(outs, expected, strict=True):
        assert relative(actual, wanted) < TOLERANCE[dtype]
    for i, (actual, wanted) in enumerate(zip(found, gradients(expected, wide), strict=True)):
        assert actual.dtype == dtype
        assert relative(actual, wanted) < 3 * TOLERANCE[dtype], i


@both_ways
@in_parts
def test_results_repeat_bit_for_bit_and_thirds_lie_side_by_side(lane, stored):
    runs = []
    for _ in range(2):
        *tensors, projected = leaves(device=lane.device)
        thirds = [x.detach().requires_grad_() for x in projected.split([20] * 3, dim=2)]
        with lane.active(), storing(stored):
            outs = nonlin_attention(AttentionWeights(*tensors[:4])[0:1], *thirds), layer(*tensors, projected)[1]
            found = gradients(outs, [*tensors[:5], *thirds])
        assert side_by_side(*found[-3:]) is not None
        runs.append([*outs, *found])
    assert all(map(torch.equal, *runs))


@both_ways
@in_parts
def test_without_gradients_results_are_the_same(lane, stored):
    tensors = leaves(device=lane.device)
    with lane.active(), storing(stored):
        outs = layer(*tensors)
        with torch.no_grad():
            assert_agrees(layer(*tensors), [out.detach() for out in outs], rounding(torch.float32, FRAMES * 16))


@in_parts
def test_a_backend_without_parts_runs_the_op_for_every_use(lane, monkeypatch):
    """As one that others register may have no more than the op."""
    calls = []
    for op in (OP, package._op):
        own = op.backends[lane.backend]
        plain = Launchers(*(getattr(own, one.name) for one in fields(Launchers)))
        backward = lambda *args, own=own: calls.append("backward") or own.backward(*args)  # noqa: E731
        monkeypatch.setitem(op.backends, lane.backend, replace(plain, backward=backward))
    tensors = leaves(device=lane.device)
    with lane.active():
        outs = layer(*tensors, penalty=0.5)
        found = gradients(outs, tensors)
    wide = [x.detach().double().cpu().requires_grad_() for x in tensors]
    expected = layer(*wide, penalty=0.5, backend="eager")
    assert calls == ["backward"] * 3
    for actual, wanted in zip([*outs, *found], [*expected, *gradients(expected, wide)], strict=True):
        assert relative(actual, wanted) < 3 * TOLERANCE[torch.float32]


# ---- what is small enough ----


def kind(lane, **options):
    with lane.active():
        return type(AttentionWeights(*leaves(device=lane.device)[:4], **options).held)


def size(lane):
    """The bytes of `leaves`' weights as the budget counts them; on the CPU the first head may lie apart."""
    return (HEADS - (lane.backend == "cpu")) * BATCH * FRAMES * FRAMES * 4


@in_parts
def test_the_budget_is_an_argument(lane):
    able = OP.backends[lane.backend].make_weights is not None
    assert kind(lane, stored_bytes=0) is RecomputedWeights
    assert kind(lane, stored_bytes=size(lane)) is RecomputedWeights
    assert kind(lane, stored_bytes=size(lane) + 1) is (StoredWeights if able else RecomputedWeights)
    with tuning.override(**{"attention.stored_bytes": 0, "attention.stored_share": 0}):
        assert kind(lane, stored_bytes=1 << 40) is (StoredWeights if able else RecomputedWeights)


@in_parts
def test_the_budget_is_tuned(lane):
    if lane.device.type != "cpu":
        pytest.skip("a GPU's is a share of its memory")
    able = OP.backends[lane.backend].make_weights is not None
    with tuning.override(**{"attention.stored_bytes": size(lane)}):
        assert kind(lane) is RecomputedWeights
    with tuning.override(**{"attention.stored_bytes": size(lane) + 1}):
        assert kind(lane) is (StoredWeights if able else RecomputedWeights)


@in_parts
def test_a_backend_that_stores_none_computes_them_again(lane, monkeypatch):
    own = OP.backends[lane.backend]
    monkeypatch.setitem(OP.backends, lane.backend, replace(own, make_weights=None, weights_gradients=None))
    assert kind(lane, stored_bytes=1 << 40) is RecomputedWeights


def test_on_a_gpu_the_budget_is_a_share_of_its_memory(monkeypatch):
    """Of that of the device of the weights, whatever is free."""
    memory = {"cuda:0": 80_000_000_000, "cuda:1": 8_000_000}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory[str(device)])
    )

    def fits(batch, device="cuda:0", **options):
        q = SimpleNamespace(shape=(1500, batch, 4, 32), dtype=torch.bfloat16, is_cuda=True, device=device)
        return budget.fits("cpu", Scores(q, q, None, None), options.get("stored_bytes"))

    each = 3 * 1500 * 1500 * 2  # bytes of a sequence; one of the four heads lies apart on the backend that stands in
    most = 80_000_000_000 * 16 // 1000
    assert fits(most // each)
    assert not fits(most // each + 1)
    assert not fits(1, "cuda:1")
    assert fits(1, "cuda:1", stored_bytes=1 << 40)
    assert not fits(1, stored_bytes=0)
    with tuning.override(**{"attention.stored_share": 0}):
        assert not fits(1)


@pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}")
def test_the_budget_of_a_module():
    module = RelPositionMultiheadAttentionWeights(32, 16, 4, 16, 4).eval()
    x, position = torch.randn(101, 2, 32), torch.randn(1, 201, 16)
    assert type(module.handle(x, position, None, None)[0].held) is StoredWeights
    module.stored_bytes = 0
    assert type(module.handle(x, position, None, None)[0].held) is RecomputedWeights
    assert set(module.state_dict()) == set(RelPositionMultiheadAttentionWeights(32, 16, 4, 16, 4).state_dict())
