"""The CUDA kernels of attention and of its gates, called by hand: masks by tile, any strides, what they refuse."""

import pytest
import torch
from contract import TOLERANCE, relative
from lanes import Lane

from zipformer_kernels.ops.attention import cuda, reference
from zipformer_kernels.ops.attention.aligned import aligned_scores, aligned_values
from zipformer_kernels.ops.attention.cases import padding, weights_inputs
from zipformer_kernels.ops.attention.scores import Masks, Scores

LANE = Lane("cuda")
HALF = torch.bfloat16, torch.float16
every_dtype = pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _lane():
    with LANE.active():
        yield


def inputs(targets, sources, batch, heads, query, position, channels, dtype):
    """Scores and values; without position channels no positional term."""
    torch.manual_seed(0)
    made = weights_inputs(targets, sources, batch, heads, query, max(position, 1), dtype, LANE.device)
    q, k, p, e = (x.detach() for x in made)
    values = torch.randn(sources, batch, heads, channels, device=LANE.device).to(dtype)
    return Scores(q, k, p if position else None, e if position else None), values


def wide(scores, masks, values):
    """In float64 on the CPU."""
    scores = scores.each(lambda x: x.cpu().double())
    return scores, Masks(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in masks)), values.cpu().double()


def expected(scores, masks, values):
    """Softmax rows and averages."""
    scores, masks, values = wide(scores, masks, values)
    weights = reference.weights(*scores, *masks, 0.0, 0.0)
    return reference.softmax_rows(*scores, *masks), (weights @ values.permute(2, 1, 0, 3)).permute(2, 1, 0, 3)


def assert_right(scores, masks, values, off=TOLERANCE[torch.float32]):
    """Rows within float32's rounding, or as far off as scores are themselves, averages within the dtype's besides."""
    (rows,) = cuda.softmax_rows(*scores, *masks)
    out = cuda.average_values(scores, rows, masks, values)
    exact_rows, exact = expected(scores, masks, values)
    for actual, wanted in zip(rows.cpu().double().unbind(-1), exact_rows.unbind(-1), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=off, atol=1e-6)
    assert out.dtype == values.dtype
    assert out.is_contiguous()
    assert relative(out, exact) < max(off, TOLERANCE[values.dtype])


SIZES = {  # targets, sources, sequences, heads, query, position and value channels
    "one block and a ragged one": (150, 150, 1, 1, 32, 4, 12),
    "left context": (9, 130, 2, 2, 32, 4, 12),
    "more targets than sources": (70, 5, 1, 2, 16, 4, 16),
    "no positions": (70, 70, 2, 1, 32, 0, 12),
    "few query channels, no positions": (66, 66, 1, 2, 9, 0, 4),
    "odd channels": (35, 35, 2, 2, 19, 3, 7),
    "two blocks of wide values": (20, 70, 1, 1, 24, 4, 230),
    "wide values": (70, 70, 1, 1, 32, 4, 144),
    "wide values, few query channels": (34, 34, 1, 2, 16, 2, 50),
    "one source": (3, 1, 2, 2, 32, 4, 12),
}


@every_dtype
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes, dtype):
    scores, values = inputs(*sizes, dtype)
    assert_right(scores, Masks(), values)


def masks_of(kind, targets, sources, batch, device):
    """Masks that leave tiles alone, mask some of their pairs, or all of them."""
    frames = torch.arange(sources, device=device)
    found = {
        "padding": Masks(padding(batch, sources, device)),
        "left padding": Masks((frames < 70).expand(batch, -1)),
        "a hole": Masks(((frames > 3) & (frames < 140)).expand(batch, -1)),
        "every second of a mask": Masks(padding(batch, 2 * sources, device)[:, ::2]),
        "all padding": Masks(torch.ones(batch, sources, dtype=torch.bool, device=device)),
        "chunks": Masks(None, None, 16, 2),
        "chunks, all to the left": Masks(None, None, 24, -1),
        "chunks and padding": Masks(padding(batch, sources, device), None, 16, 0),
        "chunks and left padding": Masks((frames < 70).expand(batch, -1), None, 16, 1),
        "one chunk": Masks(None, None, 1 << 40, 1 << 40),
        "a mask": Masks(None, torch.rand(targets, sources, device=device) > 0.7),
        "a mask for each": Masks(None, torch.rand(batch, targets, sources, device=device) > 0.7),
        "some rows": Masks(None, (torch.arange(targets, device=device) % 5 == 0).unsqueeze(1).expand(-1, sources)),
        "everything": Masks(padding(batch, sources, device), torch.rand(targets, sources, device=device) > 0.5, 24, 3),
    }
    return found[kind]


KINDS = (
    *(
        "padding",
        "left padding",
        "a hole",
        "every second of a mask",
        "all padding",
        "chunks",
        "chunks, all to the left",
        "chunks and padding",
    ),
    *("chunks and left padding", "one chunk", "a mask", "a mask for each", "some rows", "everything"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [12, 40], ids=["narrow", "wide"])
def test_masks(kind, channels):
    """Also of rows that see nothing, whose weights are uniform."""
    for frames, dtype in ((150, torch.bfloat16), (67, torch.float32)):
        scores, values = inputs(frames, frames, 2, 1, 16, 4, channels, dtype)
        assert_right(scores, masks_of(kind, frames, frames, 2, LANE.device), values)


@every_dtype
def test_large_scores(dtype):
    """Far from zero on both sides, and rows whose scores all lie below those of masked pairs.

    In float32 scores of that size are off by one or two of their last places, 1.2e-4, and so are their exponentials.
    """
    scores, values = inputs(20, 70, 1, 3, 16, 4, 12, dtype)
    q, k, p, e = scores
    k[..., 0] = 8
    q[..., 0] = torch.tensor([40.0, -40.0, -200.0], device=q.device)  # adds 320, -320, -1600
    assert_right(Scores(q, k, p, e), Masks(padding(1, 70, q.device)), values, off=1e-3)
    assert_right(Scores(q, k, p, e), masks_of("a mask", 20, 70, 1, q.device), values, off=1e-3)


def test_nothing_is_read_beyond_the_frames():
    """Frames behind the last, and rows of e behind the last offset, belong to other tensors."""
    scores, values = inputs(30, 40, 2, 2, 32, 4, 12, torch.bfloat16)

    def surrounded(x):
        room = torch.full((len(x) + 200, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
        room[100 : 100 + len(x)] = x
        return room[100 : 100 + len(x)]

    assert_right(scores.each(surrounded), Masks(), surrounded(values))


def test_tensors_of_the_module_are_not_copied():
    """Views of one projection, and values of 12 channels for each of 4 heads or of one head."""
    for dtype in (*HALF, torch.float32):
        scores, values = inputs(10, 10, 2, 4, 32, 4, 12, dtype)
        assert all(x is y for x, y in zip(aligned_scores(scores), scores, strict=True))
        assert aligned_values(values) is values
        assert aligned_values(values.view(10, 2, 1, 48)).data_ptr() == values.data_ptr()


@every_dtype
def test_any_strides(dtype):
    """What rows do not lie as kernels read them is copied."""

    def strided(x, way):
        if way == "odd rows":
            return torch.cat([x, x[..., :1]], dim=-1)[..., :-1]
        if way == "misaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if way == "channels apart":
            return x.unsqueeze(-1).repeat_interleave(2, dim=-1)[..., 0]
        return x.transpose(0, x.ndim - 1).contiguous().transpose(0, x.ndim - 1)

    scores, values = inputs(20, 20, 2, 2, 16, 4, 12, dtype)
    for way in ("odd rows", "misaligned", "channels apart", "channels first"):
        assert_right(scores.each(lambda x, way=way: strided(x, way)), Masks(), strided(values, way))
    one = Scores(*(None if x is None else x[:1].expand(x.shape) for x in scores))
    assert_right(one, Masks(), values[:1].expand(values.shape))


def test_results_repeat_bit_for_bit():
    scores, values = inputs(70, 70, 2, 2, 32, 4, 12, torch.bfloat16)
    masks = Masks(padding(2, 70, LANE.device))
    rows = [cuda.softmax_rows(*scores, *masks)[0] for _ in range(2)]
    assert torch.equal(*rows)
    assert torch.equal(*(cuda.average_values(scores, rows[0], masks, values) for _ in range(2)))


@every_dtype
@pytest.mark.parametrize("channels", [12, 40], ids=["narrow", "wide"])
def test_the_gated_average(channels, dtype):
    scores, values = inputs(33, 33, 2, 2, 32, 4, channels, dtype)
    y = torch.randn(33, 2, 2, 2 * channels, device=LANE.device).to(dtype)[..., ::2]
    (rows,) = cuda.softmax_rows(*scores, *Masks())
    out, gated = cuda.gated_average(scores, rows, Masks(), values, y)
    assert torch.equal(out, cuda.average_values(scores, rows, Masks(), values))
    assert relative(gated, expected(scores, Masks(), values)[1] * y.cpu().double()) < TOLERANCE[dtype]


def test_no_frames():
    for sizes in ((0, 1, 1, 2, 16, 0, 12), (4, 0, 1, 2, 16, 0, 12), (4, 4, 0, 2, 16, 4, 12), (4, 4, 2, 1, 16, 4, 0)):
        scores, values = inputs(*sizes, torch.bfloat16)
        (rows,) = cuda.softmax_rows(*scores, *Masks())
        out = cuda.average_values(scores, rows, Masks(), values)
        assert out.shape == (sizes[0], *values.shape[1:])
        assert torch.equal(out, torch.zeros_like(out))


def test_what_is_refused():
    scores, values = inputs(4, 4, 2, 2, 32, 4, 12, torch.float32)
    q, k, p, e = scores
    rest = values, torch.zeros(2, 2, 4, 2)
    assert cuda.unsupported(*scores, *rest) is None
    assert "up to 32 query channels" in cuda.unsupported(torch.cat([q, q], -1), torch.cat([k, k], -1), p, e, *rest)
    assert "up to 4 position channels" in cuda.unsupported(q, k, torch.cat([p, p], -1), torch.cat([e, e], -1), *rest)
    assert "one set of position" in cuda.unsupported(q, k, p, e.expand(2, -1, -1, -1), *rest)
    assert "one dtype" in cuda.unsupported(*scores, values.half(), rest[1])
    assert "float64" in cuda.unsupported(*scores.each(torch.Tensor.double), values.double(), rest[1])
