"""The CUDA kernels of attention's gradients, called by hand: several uses at once, masks, penalty, repeated runs."""

import pytest
import torch
from contract import TOLERANCE, relative
from lanes import Lane

from zipformer_kernels.ops.attention import cuda_gradients, cuda_uses, reference
from zipformer_kernels.ops.attention.cases import padding, weights_inputs
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, Use

LANE = Lane("cuda")
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
ALL = (True, True, True, True)


@pytest.fixture(autouse=True)
def _lane():
    with LANE.active():
        yield


def scores_of(targets, sources, batch, heads, query, position, dtype):
    """Without position channels there is no positional term."""
    torch.manual_seed(0)
    made = weights_inputs(targets, sources, batch, heads, query, max(position, 1), dtype, LANE.device)
    q, k, p, e = (x.detach() for x in made)
    return Scores(q, k, p if position else None, e if position else None)


def wide(x):
    return x.cpu().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def made(scores, masks, shares):
    """The softmax rows, and a use of each share: its heads, and its channels for each."""
    exact = scores.each(wide)
    masks = Masks(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in masks))
    weights = reference.weights(*exact, *masks, 0.0, 0.0)
    rows = reference.softmax_rows(*exact, *masks).float().to(LANE.device)
    uses = []
    (targets, batch, heads, _), sources, dtype = scores.q.shape, scores.k.shape[0], scores.q.dtype
    for some, channels in shares:
        count = len(range(heads)[some])
        v = torch.randn(sources, batch, count, channels).to(dtype)
        grad = torch.randn(targets, batch, count, channels).to(dtype)
        out = (weights[some] @ v.double().permute(2, 1, 0, 3)).permute(2, 1, 0, 3).to(dtype)
        uses.append(Use(some, *(x.to(LANE.device) for x in (v, out, grad))))
    return rows, uses


def expected(scores, masks, penalty, uses):
    """The gradients of q, k, p, e and of each use's values, by autograd in float64."""
    leaves = [None if x is None else wide(x).requires_grad_() for x in scores]
    masks = Masks(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in masks))
    s, masked, _ = reference.masked_scores(Scores(*leaves), masks)
    values = [wide(use.values).requires_grad_() for use in uses]
    loss = penalty.weight * (s.abs() - penalty.limit).relu().sum()
    for use, v in zip(uses, values, strict=True):
        average = (masked.softmax(-1)[use.heads] @ v.permute(2, 1, 0, 3)).permute(2, 1, 0, 3)
        loss = loss + (average * wide(use.grad)).sum()
    wanted = [x for x in leaves if x is not None] + values
    found = iter(torch.autograd.grad(loss, wanted))
    return [None if x is None else next(found) for x in leaves], list(found)


def assert_right(scores, masks, penalty, shares):
    rows, uses = made(scores, masks, shares)
    wanted, wanted_values = expected(scores, masks, penalty, uses)
    got = cuda_gradients.scores_gradients(ALL, scores, rows, masks, penalty, uses)
    floor = 0.1 * sum(wide(use.grad).norm().item() for use in uses)
    tolerance = 3 * TOLERANCE[scores.q.dtype]
    for name, actual, exact, given in zip("qkpe", got, wanted, scores, strict=True):
        assert (actual is None) == (exact is None)
        if exact is not None:
            assert (actual.dtype, actual.shape) == (given.dtype, given.shape)
            assert relative(actual, exact, floor) < tolerance, name
    for use, exact in zip(uses, wanted_values, strict=True):
        of_heads = scores.of_heads(use.heads), rows[use.heads]
        assert relative(cuda_gradients.values_gradient(*of_heads, masks, use.grad), exact) < tolerance


FIRST, ALL_HEADS = slice(0, 1), slice(None)
LAYER = [(FIRST, 40), (ALL_HEADS, 12), (ALL_HEADS, 12)]

SIZES = {  # targets, sources, sequences, heads, query and position channels; uses
    "a layer's uses": (70, 70, 1, 2, 32, 4, LAYER),
    "wide values": (66, 130, 1, 1, 24, 4, [(ALL_HEADS, 150)]),
    "wider than a block of channels": (20, 70, 1, 1, 32, 4, [(ALL_HEADS, 230)]),
    "no positions": (70, 100, 2, 1, 16, 0, [(ALL_HEADS, 16)]),
    "odd channels": (37, 41, 1, 3, 19, 3, [(slice(1, 3), 5), (slice(0, 2), 33)]),
    "more targets than sources": (150, 5, 1, 1, 8, 4, [(ALL_HEADS, 4)]),
    "two wide uses of a head": (70, 70, 1, 2, 32, 4, [(ALL_HEADS, 40), (FIRST, 48), (slice(1, 2), 24)]),
    "many uses": (20, 20, 1, 2, 16, 4, [(FIRST, 24), *[(ALL_HEADS, 4)] * 5, *[(slice(1, 2), 12)] * 4]),
    "one frame": (1, 1, 2, 2, 32, 4, LAYER),
}


@every_dtype
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes, dtype):
    *sizes, shares = sizes
    assert_right(scores_of(*sizes, dtype), Masks(), Penalty(), shares)


def masks_of(kind, targets, sources, batch):
    """Some targets of the last two kinds see nothing."""
    device = LANE.device
    if kind == "padding":
        return Masks(padding(batch, sources, device))
    if kind == "every second of a mask":
        return Masks(padding(batch, 2 * sources, device)[:, ::2])
    if kind == "chunks":
        return Masks(None, None, 16, 1)
    if kind == "mask":
        return Masks(None, torch.rand(targets, sources, device=device) > 0.6)
    hidden = torch.zeros(batch, sources, dtype=torch.bool, device=device)
    hidden[0, 30:] = True
    if kind == "blind sequence":
        hidden[0] = True
        return Masks(hidden, torch.rand(batch, targets, sources, device=device) > 0.6)
    return Masks(hidden, None, 16, 1)


@pytest.mark.parametrize(
    "kind", ["padding", "every second of a mask", "chunks", "mask", "blind sequence", "blind chunks"]
)
@pytest.mark.parametrize("penalty", [Penalty(), Penalty(0.05, 1.0)], ids=["no penalty", "penalty"])
def test_masks(kind, penalty):
    scores = scores_of(140, 140, 2, 1, 32, 4, torch.float32)
    assert_right(scores, masks_of(kind, 140, 140, 2), penalty, [(ALL_HEADS, 12)])


@every_dtype
def test_masks_of_wide_values(dtype):
    scores = scores_of(80, 80, 2, 1, 32, 4, dtype)
    assert_right(scores, masks_of("blind chunks", 80, 80, 2), Penalty(0.05, 1.0), [(ALL_HEADS, 72), (ALL_HEADS, 12)])


def test_the_penalty_comes_once_and_without_uses_too():
    scores, penalty = scores_of(20, 20, 1, 2, 16, 4, torch.float32), Penalty(0.1, 0.5)
    assert_right(scores, Masks(), penalty, [])
    assert_right(scores, Masks(), penalty, [(FIRST, 4)])
    assert_right(scores, Masks(), penalty, LAYER)


def test_gradients_side_by_side_and_those_not_wanted():
    torch.manual_seed(0)
    joint = torch.randn(40, 2, 3 * (32 + 32 + 4), device=LANE.device)
    q, k, p = (x.unflatten(2, (3, -1)) for x in joint.split([96, 96, 12], dim=2))
    scores = Scores(q / 4, k, p, torch.randn(79, 3, 4, device=LANE.device))._replace(q=q)
    rows, uses = made(scores, Masks(), [(ALL_HEADS, 12)])
    run = lambda needs: cuda_gradients.scores_gradients(needs, scores, rows, Masks(), Penalty(), uses)  # noqa: E731
    whole = run(ALL)
    assert whole[0].untyped_storage().data_ptr() == whole[2].untyped_storage().data_ptr()
    for only in range(4):
        some = run(tuple(i == only for i in range(4)))
        assert [x is not None for x in some] == [i == only for i in range(4)]
        assert torch.equal(some[only], whole[only])


def test_launches_of_a_layer(monkeypatch):
    """One for what lies beside the scores, one that sums over parts, and nothing that only fills memory."""
    calls = []
    for module in (cuda_gradients, cuda_uses):
        call = module.call_cuda
        monkeypatch.setattr(module, "call_cuda", lambda name, *args, call=call: calls.append(name) or call(name, *args))
    assert_right(scores_of(70, 70, 1, 4, 32, 4, torch.bfloat16), Masks(), Penalty(), LAYER)
    calls = [name.removeprefix("attention_") for name in calls]
    by_run = ["by_sources", "by_targets"]
    assert calls == ["pack", *by_run, *by_run, "offsets", *["values_gradient"] * 3]


def test_wide_uses_are_read_where_they_lie():
    scores = scores_of(20, 20, 1, 4, 32, 4, torch.bfloat16)
    _, uses = made(scores, Masks(), LAYER)
    (first, others), tensors = cuda_uses.bring_together(scores, uses)
    assert [heads for heads, _ in (first, others)] == [range(1), range(1, 4)]
    assert first[1].v.data == uses[0].values.data_ptr()
    assert (first[1].channels, others[1].channels, others[1].packed) == (40, 0, 24)
    assert len(tensors) == 5  # values, gradients and delta, and the use's own two


def test_results_repeat_bit_for_bit():
    scores = scores_of(140, 140, 2, 2, 32, 4, torch.bfloat16)
    rows, uses = made(scores, Masks(), LAYER)
    first, second = (cuda_gradients.scores_gradients(ALL, scores, rows, Masks(), Penalty(), uses) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_frames():
    for targets, sources in ((0, 5), (5, 0)):
        q, k = torch.zeros(targets, 1, 2, 8), torch.zeros(sources, 1, 2, 8)
        scores, rows = Scores(q.to(LANE.device), k.to(LANE.device), None, None), torch.zeros(2, 1, targets, 2)
        use = Use(ALL_HEADS, *(torch.zeros(n, 1, 2, 4, device=LANE.device) for n in (sources, targets, targets)))
        dq, dk, dp, de = cuda_gradients.scores_gradients(ALL, scores, rows, Masks(), Penalty(), [use])
        assert dq.shape == q.shape
        assert not dk.any()
        assert dp is de is None
        dv = cuda_gradients.values_gradient(scores, rows, Masks(), use.grad)
        assert dv.shape == use.values.shape
        assert not dv.any()
