"""Triton's gradients of scores from all uses of attention weights at once, stored and computed again."""

import pytest
import torch
from contract import TOLERANCE, relative
from lanes import lanes

from zipformer_kernels.core import tuning
from zipformer_kernels.ops import attention
from zipformer_kernels.ops.attention import reference
from zipformer_kernels.ops.attention.scores import Masks, Penalty, Scores, Use

SIZES = {  # position channels, query channels, targets, sources
    "one position channel": (1, 16, 70, 70),
    "some, left context": (3, 24, 33, 50),
    "more than four": (5, 16, 40, 60),
    "more than eight": (12, 40, 66, 66),
    "as many as a query's": (64, 64, 40, 40),
    "several blocks": (4, 16, 150, 150),
}
LANES = lanes(attention._op, "eager", "cpu")


def by_head(x):
    return x.permute(2, 1, 0, 3)


def wide(*tensors):
    return [x.double().cpu() if x.is_floating_point() else x.cpu() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lane", LANES)
def test_uses_of_different_heads(lane, sizes, dtype):
    from zipformer_kernels.ops.attention import triton

    position, query, targets, sources = sizes
    torch.manual_seed(0)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape)).to(dtype).to(lane.device)

    scores = Scores(
        normal(targets, 2, 3, query, scale=query**-0.5),
        normal(sources, 2, 3, query),
        normal(targets, 2, 3, position, scale=position**-0.5),
        normal(targets + sources - 1, 3, position),
    )
    padding, penalty = torch.rand(2, sources, device=lane.device) > 0.7, Penalty(0.01, 1.0)
    masks = Masks(padding)
    exact = reference.weights(*wide(*scores), padding.cpu(), None, -1, -1, *penalty)
    dw, uses = torch.zeros_like(exact), []
    for heads, channels in ((slice(None), 12), (slice(0, 1), 40)):
        own = range(3)[heads]
        v, g = normal(sources, 2, len(own), channels), normal(targets, 2, len(own), channels)
        wide_v, wide_g = (by_head(x) for x in wide(v, g))
        out = by_head(exact[heads] @ wide_v)
        dw[heads] += wide_g @ wide_v.transpose(2, 3)
        uses.append(Use(heads, v, out.to(dtype).to(lane.device), g))
    expected = reference.weights_backward(
        (True,) * 4, (dw,), (exact,), *wide(*scores), padding.cpu(), None, -1, -1, *penalty
    )[:4]
    small = {"attention.triton_scratch_bytes": 0}  # one block of targets at a time
    with lane.active(), tuning.override(**small):
        (softmax,) = triton.softmax_rows(*scores, *masks)
        (w,) = triton.make_weights(*scores, *masks, *penalty)
        recomputed = triton.scores_gradients((True,) * 4, scores, softmax, masks, penalty, uses)
        first = [tuple(x[:, :, :1] for x in use[1:]) for use in uses]
        others = [tuple(x[:, :, 1:] for x in uses[0][1:])]
        pieces = [(slice(0, 1), w[:1], None, first), (slice(1, None), w[1:], None, others)]
        stored = triton.weights_gradients((True,) * 4, pieces, scores, masks, penalty)
        averages = triton.average_values(scores, softmax, masks, uses[0].values)
        dv = triton.values_gradient(scores, softmax, masks, uses[0].grad)
    tolerance = TOLERANCE[dtype]
    assert relative(w, exact) < tolerance
    assert relative(averages, uses[0].out) < 2 * tolerance
    (grad,) = wide(uses[0].grad)
    assert relative(dv, by_head(exact.transpose(2, 3) @ by_head(grad))) < tolerance
    for name, one, other, wanted in zip("qkpe", recomputed, stored, expected, strict=True):
        assert relative(one, wanted) < 3 * tolerance, name
        assert relative(other, wanted) < 3 * tolerance, name
