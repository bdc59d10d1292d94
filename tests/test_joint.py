"""Parts of a projection side by side: when they are, room for their gradients, and a split that copies none together."""

import pytest
import torch

from zipformer_kernels.joint import empty_beside, side_by_side, split

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


def gradient(function, x, grads):
    """The gradient of x, where parts get those that are not None."""
    x = x.detach().requires_grad_()
    parts = function(x)
    pairs = [(part, grad) for part, grad in zip(parts, grads, strict=True) if grad is not None]
    return torch.autograd.grad(*zip(*pairs, strict=True) if pairs else (), inputs=x) if not pairs else backward(x, pairs)


def backward(x, pairs):
    return torch.autograd.grad([part for part, _ in pairs], x, [grad for _, grad in pairs])[0]
