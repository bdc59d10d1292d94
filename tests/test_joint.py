"""Parts of a projection side by side: room for their gradients, and a split that does not copy those together."""

import pytest
import torch

from zipformer_kernels.core.joint import empty_beside, side_by_side, split

FRAMES, BATCH, WIDTHS = 5, 3, [8, 8, 4]
CHANNELS = sum(WIDTHS)


def projection(dtype=torch.float32):
    return torch.randn(FRAMES, BATCH, CHANNELS, dtype=dtype)


def by_head(parts, heads=2):
    return [part.unflatten(2, (heads, -1)) for part in parts]


def assert_is(actual, expected):
    """The same view of the same memory."""
    assert actual.data_ptr() == expected.data_ptr()
    assert (actual.shape, actual.stride(), actual.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parts_of_a_projection_lie_side_by_side(dtype):
    x = projection(dtype)
    parts = x.split(WIDTHS, dim=2)
    assert_is(side_by_side(*parts), x)
    assert_is(side_by_side(*by_head(parts)), x)
    assert_is(side_by_side(parts[0], *by_head(parts[1:])), x)
    assert_is(side_by_side(*map(torch.ops.aten.alias, parts)), x)
    assert_is(side_by_side(x), x)


def test_parts_of_a_slice_in_time_lie_side_by_side():
    x = projection()[2:]
    assert_is(side_by_side(*x.split(WIDTHS, dim=2)), x)


def test_other_parts_do_not():
    x, other = projection(), projection()
    q, k, p = x.split(WIDTHS, dim=2)
    heads_last = q.unflatten(2, (-1, 2)).transpose(2, 3)
    batch_major = torch.randn(BATCH, FRAMES, CHANNELS).transpose(0, 1).split(WIDTHS, dim=2)
    cases = {
        "another order": (k, q, p),
        "a gap": (q, p),
        "the last is missing": (q, k),
        "the first is missing": (k, p),
        "one is None": (q, None, p),
        "the first is None": (None, k, p),
        "another storage": (q, k, other[:, :, 16:]),
        "each its own storage": (q.clone(), k.clone(), p.clone()),
        "another dtype": (q, k, p.view(torch.int32)),
        "a later frame": (q[:-1], k[1:], p[:-1]),
        "fewer frames": (q, k, p[:-1]),
        "every second frame": (q[::2], k[::2], p[::2]),
        "some sequences": (q[:, 1:], k[:, 1:], p[:, 1:]),
        "every second channel": (q[:, :, ::2], k[:, :, ::2]),
        "channels not in order": (heads_last, k, p),
        "batch-major": batch_major,
        "expanded": (q[:, :, :1].expand(-1, -1, 8), k, p),
        "no frames": tuple(part[:0] for part in (q, k, p)),
        "no channels": (q, k, p, x[:, :, CHANNELS:]),
    }
    for what, parts in cases.items():
        assert side_by_side(*parts) is None, what


def test_room_for_gradients_lies_as_the_parts_do():
    x = projection()
    parts = by_head(x.split(WIDTHS, dim=2))
    room = empty_beside(*parts)
    assert [t.shape for t in room] == [part.shape for part in parts]
    joint = side_by_side(*room)
    assert joint.shape == x.shape
    assert joint.data_ptr() != x.data_ptr()


def test_room_for_parts_that_lie_apart_lies_apart():
    parts = [torch.randn(FRAMES, BATCH, width, dtype=torch.float64) for width in WIDTHS]
    room = empty_beside(*parts)
    assert [(t.shape, t.stride(), t.dtype) for t in room] == [(t.shape, t.stride(), t.dtype) for t in parts]
    assert len({t.untyped_storage().data_ptr() for t in (*room, *parts)}) == 2 * len(WIDTHS)


# ---- split ----


def torchs_split(x, widths):
    return x.split(widths, dim=2)


def gradient(function, x, grads):
    """The gradient of x, where the parts get those that are not None."""
    pairs = [pair for pair in zip(function(x, WIDTHS), grads, strict=True) if pair[1] is not None]
    return torch.autograd.grad([part for part, _ in pairs], x, [grad for _, grad in pairs])[0]


def test_split_gives_the_parts():
    x = projection().requires_grad_()
    for part, expected in zip(split(x, WIDTHS), x.split(WIDTHS, dim=2), strict=True):
        assert_is(part, expected)
        assert part.requires_grad


@pytest.mark.parametrize("given", ["side by side", "apart", "in another order", "expanded"])
@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_are_those_of_torchs_split(given, missing):
    """A missing gradient counts as zeros."""
    x = projection().requires_grad_()
    grads = list(torch.randn(FRAMES, BATCH, CHANNELS).split(WIDTHS, dim=2))
    if given == "apart":
        grads = [grad.clone() for grad in grads]
    elif given == "in another order":
        grads[:2] = grads[1::-1]
    elif given == "expanded":
        grads = [torch.randn(()).expand(grad.shape) for grad in grads]
    grads = [None if i in missing else grad for i, grad in enumerate(grads)]
    assert torch.equal(gradient(split, x, grads), gradient(torchs_split, x, grads))


def test_gradients_side_by_side_are_not_copied():
    x, joint = projection().requires_grad_(), projection()
    assert_is(gradient(split, x, joint.split(WIDTHS, dim=2)), joint)
    assert gradient(torchs_split, x, joint.split(WIDTHS, dim=2)).data_ptr() != joint.data_ptr()
    apart = [grad.clone() for grad in joint.split(WIDTHS, dim=2)]
    assert gradient(split, x, apart).data_ptr() not in [grad.data_ptr() for grad in apart]


def test_gradients_of_parts_by_head_are_not_copied():
    x, joint = projection().requires_grad_(), projection()
    parts, grads = by_head(split(x, WIDTHS)), by_head(joint.split(WIDTHS, dim=2))
    (dx,) = torch.autograd.grad(parts, x, grads)
    assert_is(dx, joint)


class NoGradient(torch.autograd.Function):
    """Whose backward has none to give."""

    @staticmethod
    def forward(ctx, *parts):
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx, grad):
        return None, None, None


def test_without_any_gradient_there_is_none():
    x = projection().requires_grad_()
    NoGradient.apply(*split(x, WIDTHS)).sum().backward()
    assert x.grad is None or torch.equal(x.grad, torch.zeros_like(x))


def test_gradients_can_be_differentiated():
    """Also where the parts' gradients lie side by side, as those of a concatenation do."""
    x = projection(torch.float64).requires_grad_()

    def apart(x):
        q, k, p = split(x, WIDTHS)
        return q * k, p.square()

    def side_by_side_again(x):
        return torch.cat(split(x, WIDTHS), dim=2) ** 3

    for function in (apart, side_by_side_again):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_without_a_gradient_to_come_it_is_torchs_split():
    x = projection()
    assert all(part.grad_fn is None for part in split(x, WIDTHS))
    assert "_Split" in split(x.requires_grad_(), WIDTHS)[0].grad_fn.name()
    with torch.no_grad():
        for part, expected in zip(split(x, WIDTHS), x.split(WIDTHS, dim=2), strict=True):
            assert_is(part, expected)
            assert type(part.grad_fn) is type(expected.grad_fn)


def test_recorded_it_is_torchs_split():
    """Under torch.compile and torch.func nothing of ours is in the graph."""
    targets = []

    def record(module, _):
        targets.extend(str(node.target) for node in module.graph.nodes if node.op.startswith("call"))
        return module.forward

    def weighted(x):
        return sum(i * part.sum() for i, part in enumerate(split(x, WIDTHS), start=1))

    torch._dynamo.reset()
    x = projection().requires_grad_()
    compiled = torch.compile(weighted, backend=record, fullgraph=True)
    (dx,) = torch.autograd.grad(compiled(x), x)
    assert "split" in targets
    assert not any("_Split" in target or "autograd_function" in target for target in targets), targets
    assert torch.equal(dx, torch.autograd.grad(weighted(x), x)[0])
    assert torch.equal(torch.func.grad(weighted)(x.detach()), dx)
