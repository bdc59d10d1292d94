"""The handle of attention weights: several uses of one set, penalties, constant weights, and what it looks like."""

import pytest
import torch
from lanes import lanes
from test_attention import OP, both_ways, relative, storing
from tolerances import assert_agrees, rounding

from zipformer_kernels.core.backend import use_backend
from zipformer_kernels.ops import attention
from zipformer_kernels.ops.attention import AttentionWeights, ChunkMask, aggregate


@both_ways
@pytest.mark.parametrize("lane", lanes(OP))
def test_three_uses_of_one_set_of_weights_add_their_gradients(lane, stored):
    torch.manual_seed(2)
    shapes = [(20, 2, 3, 8), (20, 2, 3, 8), (20, 2, 3, 4), (39, 3, 4), (20, 2, 12), (20, 2, 36), (20, 2, 36)]
    results = []
    for active, dtype, device in (
        (lane.active, torch.float32, lane.device),
        (lambda: use_backend("eager"), torch.float64, "cpu"),
    ):
        torch.manual_seed(2)
        leaves = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]

        def use(leaves):
            weights = AttentionWeights(*leaves[:4])
            first = weights[0:1].aggregate(leaves[4])
            second = weights.aggregate(leaves[5])
            return [first, second, weights.aggregate(leaves[6] + second)]

        with active(), storing(stored):
            outs = use(leaves)
            loss = sum((out.double() ** 2).sum() for out in outs)
            results.append((outs, torch.autograd.grad(loss, leaves)))
    for actual, wanted in zip(*[[*outs, *grads] for outs, grads in results], strict=True):
        assert relative(actual, wanted) < 1e-5


@both_ways
@pytest.mark.parametrize("lane", lanes(OP))
def test_penalty_comes_once_for_all_uses(lane, stored):
    torch.manual_seed(3)
    q, k = ((3 * torch.randn(9, 1, 2, 4)).to(lane.device).requires_grad_() for _ in range(2))
    values = torch.randn(9, 1, 6, device=lane.device)
    with lane.active(), storing(stored):
        weights = AttentionWeights(q, k, penalty=0.5, limit=10.0)
        zero = 0.0 * (weights.aggregate(values) + weights.aggregate(values) + 1).sum()
        zero = zero + 0.0 * weights[0:1].aggregate(values).sum()
        dq, dk = torch.autograd.grad(zero, (q, k))
    scores = attention.reference.scores(q, k, None, None)
    assert (scores.abs() > 10).any()
    expected = torch.autograd.grad(0.5 * (scores.abs() - 10).relu().sum(), (q, k))
    torch.testing.assert_close((dq, dk), expected, rtol=1e-5, atol=1e-5)


@both_ways
@pytest.mark.parametrize("materialized", [0, 1, 2])
def test_penalty_comes_once_where_weights_are_materialized_too(stored, materialized):
    """As where modules in our place want a tensor. So many frames are not left to eager, which always stores."""
    torch.manual_seed(3)
    q, k = (3 * torch.randn(101, 1, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    values = torch.randn(101, 1, 6, dtype=torch.float64)
    with storing(stored):
        weights = AttentionWeights(q, k, penalty=0.5, limit=10.0)
        made = [weights.materialize() if i < materialized else weights for i in range(2)]
        zero = 0.0 * (aggregate(made[0], values) + aggregate(made[1], values) + 1).sum()
        actual = torch.autograd.grad(zero, (q, k))
    scores = attention.reference.scores(q, k, None, None)
    assert (scores.abs() > 10).any()
    expected = torch.autograd.grad(0.5 * (scores.abs() - 10).relu().sum(), (q, k))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@both_ways
@pytest.mark.parametrize("lane", lanes(OP))
def test_a_target_that_sees_nothing_averages_everything(lane, stored):
    torch.manual_seed(4)
    q, k = (torch.randn(50, 2, 1, 16, device=lane.device, requires_grad=True) for _ in range(2))
    values = torch.randn(50, 2, 5, device=lane.device)
    padding = torch.zeros(2, 50, dtype=torch.bool, device=lane.device)
    padding[1] = True
    with lane.active(), storing(stored):
        out = AttentionWeights(q, k, key_padding_mask=padding).aggregate(values)
        dq, dk = torch.autograd.grad(out.sum(), (q, k))
    torch.testing.assert_close(out[:, 1], values[:, 1].mean(0).expand(50, 5), rtol=1e-5, atol=1e-6)
    assert (dq[:, 1] == 0).all()
    assert (dk[:, 1] == 0).all()


@both_ways
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("lane", lanes(OP))
def test_constant_weights_are_a_masked_mean(lane, positions, stored):
    torch.manual_seed(5)
    q, k = (torch.randn(30, 2, 2, 8, device=lane.device, requires_grad=True) for _ in range(2))
    p, e = (torch.randn(shape, device=lane.device, requires_grad=True) for shape in ((30, 2, 2, 4), (59, 2, 4)))
    scores = (q, k, p, e) if positions else (q, k)
    values = torch.randn(30, 2, 10, device=lane.device, requires_grad=True)
    rule = ChunkMask(8, 1)
    with lane.active(), storing(stored):
        out = AttentionWeights(*scores, attn_mask=rule).constant().aggregate(values)
        (dv,) = torch.autograd.grad(out.sum(), values)
    seen = (~rule.materialize(30, lane.device)).float()
    weights = seen / seen.sum(1, keepdim=True)
    torch.testing.assert_close(out, torch.einsum("ij,jbc->ibc", weights, values), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dv, weights.sum(0)[:, None, None].expand_as(dv), rtol=1e-5, atol=1e-6)
    assert out.requires_grad


@both_ways
@pytest.mark.parametrize("lane", lanes(OP))
def test_handle_looks_like_the_weights(lane, stored):
    q, k = (torch.randn(6, 2, 4, 8, device=lane.device) for _ in range(2))
    with lane.active(), storing(stored):
        weights = AttentionWeights(q, k)
        dense = weights.materialize()
        assert weights.shape == dense.shape == (4, 2, 6, 6)
        assert weights.dtype == dense.dtype
        assert weights.device == dense.device
        assert weights[1:3].shape == (2, 2, 6, 6)
        assert_agrees(weights[1:3].materialize(), dense[1:3], rounding(dense.dtype, 8))
        assert_agrees(dense.sum(-1), torch.ones_like(dense[..., 0]), rounding(dense.dtype, 6))
        assert lane.backend in repr(weights)


def test_chunk_rule_is_upstreams_mask():
    t = torch.arange(50)
    for chunk, left in ((8, 2), (8, -1), (16, 0)):
        c = t // chunk
        expected = (c > c[:, None]) | (c < c[:, None] - (left if left >= 0 else 10**6))
        assert torch.equal(ChunkMask(chunk, left).materialize(50), expected)
        halved = ChunkMask(chunk, left).downsample(2).materialize(25)
        assert torch.equal(halved, expected[::2, ::2])
    with pytest.raises(ValueError, match="multiple of the downsampling factor 3"):
        ChunkMask(8).downsample(3)
