"""Matrix products of rows with what is done to their results: each function against its formula in float64."""

import importlib
import math

import pytest
import torch
from lanes import HAS_GPU
from tolerances import rounding

from zipformer_kernels.branch import products
from zipformer_kernels.branch.products import BY_TORCH, Dropout, choose, unsupported
from zipformer_kernels.core import backend, tuning
from zipformer_kernels.core.backend import use_backend

HALF = (torch.float16, torch.bfloat16)
LANES = [pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in (torch.float64, torch.float32, *HALF)]
LANES += [pytest.param("triton", dtype, id=f"triton-{dtype}") for dtype in HALF]

SHAPES = {  # frames, sequences, channels, hidden channels
    "whole tiles": (64, 4, 64, 128),
    "ragged": (37, 5, 72, 136),
    "odd": (3, 7, 19, 33),
    "one row": (1, 1, 16, 48),
    "no rows": (0, 3, 16, 16),
    "no sequence": (4, 0, 16, 16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
lanes = pytest.mark.parametrize(("lane", "low"), LANES)


def products_of(lane):
    if lane == "torch":
        return BY_TORCH
    if backend.missing["triton"]:
        pytest.skip(backend.missing["triton"])
    return products._triton()


def device_of(lane):
    return "cuda" if HAS_GPU and lane == "triton" else "cpu"


def drawn(*sizes, dtype, lane, scale=1.0):
    return (scale * torch.randn(sizes)).to(dtype).to(device_of(lane))


def wide(*tensors):
    """In float64, on the CPU."""
    return [None if x is None else x.detach().double().cpu() for x in tensors]


def assert_near(actual, expected, terms, size, what, between=None):
    """Within what sums of `terms` terms in float32 explain, whose sizes are `size`, and the rounding of `actual`.

    Args:
        between: where another result was rounded to the dtype of products before, that dtype and its size.
    """
    assert actual.shape == expected.shape, what
    actual_64, own = actual.detach().double().cpu(), torch.finfo(actual.dtype)
    if expected.numel() == 0:
        return
    sums = torch.promote_types(actual.dtype, torch.float32)
    if between is not None:
        sums = torch.promote_types(between[0], torch.float32)
    size = torch.as_tensor(size).expand(expected.shape)
    allowed = rounding(sums, terms) * size.clamp(min=size.square().mean().sqrt().item()) + own.smallest_normal * own.eps
    allowed = allowed + own.eps * expected.abs()
    if between is not None:
        allowed = allowed + torch.finfo(between[0]).eps * between[1]
    excess = ((actual_64 - expected).abs() / allowed).max().item()
    assert excess <= 1, f"{what}: off by {excess:.2f} of what rounding explains"


def curve(x, kind):
    """Swoosh and its derivative, in float64."""
    shift, offset = {"l": (4.0, 0.035), "r": (1.0, 0.313261687)}[kind]
    zero = torch.zeros((), dtype=x.dtype)
    return torch.logaddexp(zero, x - shift) - 0.08 * x - offset, torch.sigmoid(x - shift) - 0.08


def weight_of(out_channels, in_channels, low, lane, layout="rows"):
    """(out, in), scaled so that products are of the size of x; rows or columns lie together, or it is part of more."""
    scale = 1 / math.sqrt(in_channels)
    if layout == "columns":
        return drawn(in_channels, out_channels, dtype=low, lane=lane, scale=scale).t()
    if layout == "part":
        return drawn(out_channels + 3, in_channels + 5, dtype=low, lane=lane, scale=scale)[2:-1, 4:-1]
    return drawn(out_channels, in_channels, dtype=low, lane=lane, scale=scale)


def dropout_of(sequences, channels, low, lane, kind):
    """A dropout, with draws in half precision or not, or None."""
    if kind is None:
        return None
    draws = torch.rand(sequences, channels, dtype=low if kind == "low" else torch.float32).to(device_of(lane))
    return Dropout(draws[None] if kind == "low" else draws, 0.3)


def mask_in_float64(dropout):
    """What a result is multiplied by."""
    if dropout is None:
        return None
    factor = torch.tensor(1 / (1 - dropout.rate))  # in float32, as the mask of a module
    return (dropout.draws > dropout.rate).double().cpu() * factor.double()


def chosen_of(sequences, lane):
    """Which sequences get a branch: all but the first."""
    return (torch.arange(sequences) > 0).float()[:, None].to(device_of(lane))


def summed(sums, channels):
    """What parts add up to, in float64; all of the right form."""
    assert sums.ndim == 2
    assert sums.shape[1] == channels
    return sums.double().cpu().sum(0)


# ---- each function ----


@lanes
@shapes
@pytest.mark.parametrize(
    ("kind", "mask", "bias", "layout"),
    [("l", "low", "low", "rows"), ("l", "float32", "float32", "part"), ("r", None, None, "columns")],
)
def test_activated(lane, low, shape, kind, mask, bias, layout):
    frames, sequences, channels, hidden_channels = shape
    x = drawn(frames, sequences, channels, dtype=low, lane=lane)
    weight = weight_of(hidden_channels, channels, low, lane, layout)
    bias_dtype = low if bias == "low" or low == torch.float64 else torch.float32
    bias = None if bias is None else drawn(hidden_channels, dtype=bias_dtype, lane=lane)
    dropout = dropout_of(sequences, hidden_channels, low, lane, mask)
    activated = products_of(lane).activated
    hidden, a = activated(x, weight, bias, dropout, kind, True)
    (x64, w64, b64, h64), m64 = wide(x, weight, bias, hidden), mask_in_float64(dropout)
    expected = x64 @ w64.t() + (0 if b64 is None else b64)
    size = x64.abs() @ w64.abs().t() + (0 if b64 is None else b64.abs())
    rounded_bias = None if b64 is None else (low, b64.abs().expand(expected.shape))
    assert hidden.dtype == a.dtype == low
    assert_near(hidden, expected, channels + 1, size, "hidden", rounded_bias)
    factor = 1 if m64 is None else m64
    assert_near(a, curve(h64, kind)[0] * factor, 4, (h64.abs() + 1) * factor, "a")
    none, again = activated(x, weight, bias, dropout, kind, False)
    assert none is None
    assert torch.equal(again, a), "stored or not"


@lanes
@shapes
@pytest.mark.parametrize(("kind", "mask"), [("l", "low"), ("l", "float32"), ("r", None)])
def test_activated_gradient(lane, low, shape, kind, mask):
    frames, sequences, channels, hidden_channels = shape
    grad = drawn(frames, sequences, channels, dtype=low, lane=lane)
    weight = weight_of(channels, hidden_channels, low, lane)
    hidden = drawn(frames, sequences, hidden_channels, dtype=low, lane=lane, scale=3.0)
    dropout = dropout_of(sequences, hidden_channels, low, lane, mask)
    dhidden, a, sums = products_of(lane).activated_gradient(grad, weight, hidden, dropout, kind)
    assert dhidden.dtype == a.dtype == low
    (g64, w64, h64), m64 = wide(grad, weight, hidden), mask_in_float64(dropout)
    factor = 1 if m64 is None else m64
    value, slope = curve(h64, kind)
    size = (g64.abs() @ w64.abs()) * factor
    assert_near(dhidden, g64 @ w64 * factor * slope, channels + 4, size, "dhidden", (low, size))
    assert_near(a, value * factor, 4, (h64.abs() + 1) * factor, "a")
    assert_sums(sums, dhidden, hidden_channels)


def assert_sums(sums, x, channels):
    """Sums of the rows of x; those of Triton take them before they are rounded."""
    (x64,) = wide(x)
    rows, found = x64.flatten(0, 1), summed(sums, channels)
    assert sums.dtype == torch.promote_types(x.dtype, torch.float32)
    size = rows.abs().sum(0)
    assert_near(found, rows.sum(0), max(len(rows), 1), size, "sums", (x.dtype, size))


@lanes
@shapes
@pytest.mark.parametrize("src_dtype", ["wide", "low"])
@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("bias", [None, "float32"])
def test_added(lane, low, shape, src_dtype, chooses, bias):
    frames, sequences, channels, hidden_channels = shape
    src_dtype = torch.promote_types(low, torch.float32) if src_dtype == "wide" else low
    src = drawn(frames, sequences, channels, dtype=src_dtype, lane=lane)
    x = drawn(frames, sequences, hidden_channels, dtype=low, lane=lane)
    weight = weight_of(channels, hidden_channels, low, lane)
    bias = None if bias is None else drawn(channels, dtype=torch.float32, lane=lane)
    chosen = chosen_of(sequences, lane) if chooses else None
    y, y_low = products_of(lane).added(src, x, weight, bias, chosen, low)
    s64, x64, w64, b64, c64 = wide(src, x, weight, bias, chosen)
    factor = 1 if c64 is None else c64
    product = x64 @ w64.t() + (0 if b64 is None else b64)
    size = x64.abs() @ w64.abs().t() + (0 if b64 is None else b64.abs())
    assert y.dtype == src_dtype
    assert_near(y, s64 + factor * product, hidden_channels + 2, size + s64.abs(), "y", (low, 2 * size))
    assert_low_copy(y, y_low, low)


def assert_low_copy(x, x_low, low):
    assert x_low.dtype == low
    assert torch.equal(x_low, x.to(low))
    assert (x_low is x) == (x.dtype == low)


@lanes
@shapes
@pytest.mark.parametrize("grad_dtype", ["wide", "low"])
def test_added_gradient(lane, low, shape, grad_dtype):
    frames, sequences, channels, hidden_channels = shape
    grad_dtype = torch.promote_types(low, torch.float32) if grad_dtype == "wide" else low
    grad = drawn(frames, sequences, channels, dtype=grad_dtype, lane=lane)
    dhidden = drawn(frames, sequences, hidden_channels, dtype=low, lane=lane)
    weight = weight_of(hidden_channels, channels, low, lane)
    dsrc, dsrc_low, sums = products_of(lane).added_gradient(grad, dhidden, weight, low)
    g64, d64, w64 = wide(grad, dhidden, weight)
    size = d64.abs() @ w64.abs()
    assert dsrc.dtype == grad_dtype
    assert_near(dsrc, g64 + d64 @ w64, hidden_channels + 1, size + g64.abs(), "dsrc", (low, 2 * size))
    assert_low_copy(dsrc, dsrc_low, low)
    if lane == "torch":  # where sums would be a pass of their own
        assert sums is None
    else:
        assert_sums(sums, dsrc_low, channels)


@lanes
@shapes
@pytest.mark.parametrize("wider", [False, True])
def test_weight_gradient(lane, low, shape, wider):
    frames, sequences, channels, hidden_channels = shape
    dtype = torch.promote_types(low, torch.float32) if wider else low
    grad = drawn(frames, sequences, hidden_channels, dtype=low, lane=lane)
    x = drawn(frames, sequences, channels, dtype=low, lane=lane)
    dweight = products_of(lane).weight_gradient(grad, x, dtype)
    g64, x64 = (one.flatten(0, 1) for one in wide(grad, x))
    assert dweight.dtype == dtype
    expected, size = g64.t() @ x64, g64.abs().t() @ x64.abs()
    assert_near(dweight, expected, frames * sequences, size, "dweight", (low, expected.abs()))


@lanes
@shapes
@pytest.mark.parametrize("grad_dtype", ["wide", "low"])
@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_lowered(lane, low, shape, grad_dtype, chooses, expanded):
    frames, sequences, channels, _ = shape
    grad_dtype = torch.promote_types(low, torch.float32) if grad_dtype == "wide" else low
    grad = drawn(frames, sequences, channels, dtype=grad_dtype, lane=lane)
    if expanded:
        grad = grad[:, :, :1].expand(frames, sequences, channels)
    chosen = chosen_of(sequences, lane) if chooses else None
    lowered, sums = products_of(lane).lowered(grad, chosen, low)
    g64, c64 = wide(grad, chosen)
    expected = g64 if c64 is None else g64 * c64
    assert lowered.dtype == low
    assert_near(lowered, expected, 1, expected.abs(), "lowered")
    assert_sums(sums, lowered, channels)


@lanes
def test_totals(lane, low):
    """Of one tensor, and of two at once, in one launch."""
    dtype = torch.promote_types(low, torch.float32)
    one, other = (drawn(*sizes, dtype=dtype, lane=lane) for sizes in ((137, 40), (3, 70)))
    total, none = products_of(lane).totals(one)
    assert none is None
    for sums, found in zip((one, other, one), (*products_of(lane).totals(one, other), total), strict=True):
        (s64,) = wide(sums)
        assert found.dtype == dtype
        assert_near(found, s64.sum(0), len(sums), s64.abs().sum(0), "total")


# ---- Triton's kernels ----


def everything(triton, x, src):
    """What all functions return that have sums, or read masks and factors of sequences."""
    channels, hidden_channels = x.shape[-1], 160
    torch.manual_seed(1)
    first, last = (weight_of(*sizes, x.dtype, "triton") for sizes in ((160, channels), (channels, 160)))
    bias = drawn(hidden_channels, dtype=torch.float32, lane="triton")
    dropout, chosen = dropout_of(x.shape[1], hidden_channels, x.dtype, "triton", "low"), chosen_of(x.shape[1], "triton")
    hidden, a = triton.activated(x, first, bias, dropout, "l", True)
    y, y_low = triton.added(src, a, last, None, chosen, x.dtype)
    low, sums = triton.lowered(y, chosen, x.dtype)
    return (
        *(hidden, a, y, y_low, low, sums),
        *triton.activated_gradient(low, last, hidden, dropout, "l"),
        *triton.added_gradient(y, hidden, first, x.dtype),
    )


def test_the_same_input_gives_the_same_bits():
    triton = products_of("triton")
    x, src = (drawn(31, 7, 72, dtype=dtype, lane="triton") for dtype in (torch.bfloat16, torch.float32))
    once, again = everything(triton, x, src), everything(triton, x, src)
    assert all(map(torch.equal, once, again))


def test_what_is_not_contiguous_is_read_as_it_is():
    triton = products_of("triton")
    x, src = (drawn(72, 7, 31, dtype=dtype, lane="triton").transpose(0, 2) for dtype in (torch.bfloat16, torch.float32))
    assert all(map(torch.equal, everything(triton, x, src), everything(triton, x.contiguous(), src.contiguous())))


def test_a_row_does_not_depend_on_others():
    triton = products_of("triton")
    x, src = (drawn(60, 7, 72, dtype=dtype, lane="triton") for dtype in (torch.bfloat16, torch.float32))
    whole, part = everything(triton, x, src), everything(triton, x[:40], src[:40])
    for one, other in zip(whole, part, strict=True):
        if one.ndim == 3:
            assert torch.equal(one[:40], other)


@pytest.mark.parametrize("tile", [(32, 64, 16, 4, 2), (64, 256, 32, 8, 3), (256, 64, 64, 8, 2)])
def test_other_tiles(tile):
    call = "triton", torch.float16, SHAPES["ragged"]
    with tuning.override(**{f"products.triton_{name}": tile for name in ("tile", "ragged_tile", "narrow_tile")}):
        test_activated(*call, "l", "low", "low", "rows")
        test_activated_gradient(*call, "l", "low")
        test_added(*call, "wide", True, "float32")
        test_added_gradient(*call, "wide")
    with tuning.override(**{"products.triton_lowered_tile": (32, 16, 4)}):
        test_lowered(*call, "wide", True, False)


def test_sequences_of_rows():
    products_of("triton")
    kernel = importlib.import_module("sequences_kernel").sequences_kernel
    rows = torch.empty(128, dtype=torch.int32, device=device_of("triton"))
    for sequences in (*range(1, 140), 1000, 4097, products.MOST_SEQUENCES - 1, products.MOST_SEQUENCES):
        for first in (0, sequences - 1, sequences // 2, 128 * 7_000_000):
            kernel[(1,)](rows, first, sequences, ROWS=128)
            expected = (torch.arange(128) + first) % sequences
            assert torch.equal(rows.cpu().long(), expected), (first, sequences)


@pytest.mark.gpu("2^31 elements and more")
@pytest.mark.xdist_group("large")
def test_more_elements_than_32_bits_count():
    triton, low = products_of("triton"), torch.bfloat16
    frames, sequences, channels, hidden_channels = 1 << 18, 17, 64, 512
    x = torch.zeros(frames, sequences, channels, dtype=low, device="cuda")
    x[-1] = torch.randn(sequences, channels)
    weight = weight_of(hidden_channels, channels, low, "triton")
    hidden, a = triton.activated(x, weight, None, None, "r", True)
    last = triton.activated(x[-1:], weight, None, None, "r", True)
    assert torch.equal(hidden[-1:], last[0])
    assert torch.equal(a[-1:], last[1])
    y, _ = triton.added(x, a, weight.t(), None, None, low)
    assert torch.equal(y[-1:], triton.added(x[-1:], a[-1:], weight.t(), None, None, low)[0])


# ---- which products a call gets ----


def test_what_triton_cannot_take_is_pytorchs():
    src = torch.zeros(2, 3, 8)
    with use_backend("triton,eager"):
        for own in (choose(src, torch.float32), choose(src.double(), torch.bfloat16)):
            assert own.added is BY_TORCH.added
            assert own is not BY_TORCH, "with Triton's passes for Swoosh"
    many = torch.empty(0, products.MOST_SEQUENCES + 1, 8)
    assert "sequences at most, got 65537" in unsupported(many, torch.bfloat16)
    assert "half precision, got torch.float32" in unsupported(src, torch.float32)
    assert "got torch.float64" in unsupported(src.double(), torch.bfloat16)


def test_the_choice_of_a_backend_holds():
    src = torch.zeros(2, 3, 8, device=device_of("triton"))
    assert choose(src.cpu(), torch.bfloat16).added is BY_TORCH.added, "auto on a CPU"
    triton = products_of("triton")
    for request, expected in (("triton", triton), ("eager", BY_TORCH), ("triton,eager", triton)):
        with use_backend(request):
            assert choose(src, torch.bfloat16) is expected, request
