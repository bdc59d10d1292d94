"""Whole modules in one kernel on a stream's chunk: the few rows of csrc/linear, and what lies between the products."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lanes import lanes
from test_inference import SIZES, arguments, called, layer
from tolerances import PARITY, assert_agrees, assert_rounded

from zipformer_kernels import use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.core.launch import FEW_ROWS, few_rows
from zipformer_kernels.core.op import SettledBackend
from zipformer_kernels.ops import get
from zipformer_kernels.ops.attention.stream import stream_attention
from zipformer_kernels.ops.conv_module.stream import stream_conv_module
from zipformer_kernels.ops.swoosh.reference import swoosh
from zipformer_kernels.ops.swoosh_linear import infer_feed_forward

# Frames and sequences: every number of rows that blocks of rows are left over for, and more than auto would take.
CHUNKS = ((1, 1), (2, 1), (1, 3), (4, 1), (5, 1), (7, 1), (8, 1), (5, 3), (16, 1), (23, 1))
WIDTHS = ((1, 1), (5, 7), (64, 48), (33, 100), (48, 17))  # registers and blocks of columns are left over for


def normal(*shape, dtype, scale=1.0):
    return torch.randn(shape, dtype=dtype) * scale


def linear(out_channels, in_channels, dtype, bias=True):
    weight = normal(out_channels, in_channels, dtype=dtype, scale=in_channels**-0.5)
    return weight, normal(out_channels, dtype=dtype) if bias else None


def wide(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def terms(src, hidden):
    """How many products go into an element: of both linear layers, and of a sum of `hidden` between or behind them."""
    return 2 * src.shape[-1] + hidden


# ---- feed-forward ----


def feed_forward_arguments(rows, channels, hidden, dtype, bias=True, kind="l"):
    return (
        normal(*rows, channels, dtype=dtype),
        *linear(hidden, channels, dtype, bias),
        *linear(channels, hidden, dtype, bias),
        kind,
    )


def check_feed_forward(*args):
    actual = infer_feed_forward(*args)
    src, first, b1, second, b2, kind = wide(args)
    expected = src + F.linear(swoosh(F.linear(src, first, b1), kind), second, b2)
    assert actual.dtype == args[0].dtype
    assert_rounded(actual, expected, terms(src, first.shape[0]), f"{tuple(src.shape)}, {first.shape[0]} hidden")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lane", lanes(get("swoosh_linear.feed_forward")))
def test_feed_forward(lane, dtype):
    with lane.active():
        for rows in CHUNKS:
            for channels, hidden in WIDTHS:
                check_feed_forward(*feed_forward_arguments(rows, channels, hidden, dtype))
        check_feed_forward(*feed_forward_arguments((3,), 20, 40, dtype, bias=False))
        check_feed_forward(*feed_forward_arguments((), 20, 40, dtype, kind="r"))


@pytest.mark.usefixtures("isa")
def test_feed_forward_under_every_instruction_set():
    with use_backend("cpu"):
        for dtype in (torch.float32, torch.float64):
            for rows in CHUNKS:
                check_feed_forward(*feed_forward_arguments(rows, 33, 50, dtype))


def test_threads_change_nothing():
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    before = torch.get_num_threads()
    args = feed_forward_arguments((7, 2), 200, 300, torch.float32)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(infer_feed_forward(*args, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, results[0]) for x in results)


# ---- the convolution module ----


def conv_arguments(frames, batch, channels, kernel, dtype, bias=True):
    half = kernel // 2
    inner = (
        normal(channels, 1, kernel, dtype=dtype),
        normal(channels, dtype=dtype) if bias else None,
        normal(channels, 1, half + 1, dtype=dtype),
        normal(channels, dtype=dtype) if bias else None,
        normal(2, channels, kernel, dtype=dtype),
    )
    return (
        normal(frames, batch, channels, dtype=dtype),
        *linear(2 * channels, channels, dtype, bias),
        normal(batch, channels, half, dtype=dtype),
        *inner,
        torch.rand(batch, frames) > 0.7,
        *linear(channels, channels, dtype, bias),
    )


def check_conv(*args):
    y, following = stream_conv_module(*args)
    expected, expected_following = get("conv_module.stream").reference(*wide(args))
    # The convolutions' sums cancel: errors count against what their absolute values would give.
    sums = get("conv_module.stream").reference(
        *(x.abs() if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x for x in args)
    )
    what = f"{tuple(args[0].shape)}, {args[4].shape[2]} taps"
    assert_rounded(y, expected, terms(args[0], args[4].shape[2]), what, sums[0].double())
    assert_rounded(following, expected_following, args[0].shape[2], what + ", left", sums[1].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lane", lanes(get("conv_module.stream")))
def test_conv_module(lane, dtype):
    with lane.active():
        for frames, batch in CHUNKS:
            for channels, kernel in ((1, 1), (9, 5), (70, 31), (192, 15)):
                check_conv(*conv_arguments(frames, batch, channels, kernel, dtype))
        check_conv(*conv_arguments(4, 2, 9, 5, dtype, bias=False))


# ---- averages ----


def attention_arguments(frames, batch, channels, context, heads, values, gated, dtype, bias=True):
    thirds = 3 if gated else 1
    weights = normal(heads, batch, frames, context + frames, dtype=dtype).softmax(dim=-1)
    return (
        normal(frames, batch, channels, dtype=dtype),
        *linear(thirds * heads * values, channels, dtype, bias),
        normal(context, batch, heads * values, dtype=dtype),
        weights,
        *linear(channels, heads * values, dtype, bias),
        gated,
    )


def check_attention(*args):
    y, joined = stream_attention(*args)
    expected, expected_joined = get("attention.stream").reference(*wide(args))
    what = f"{tuple(args[0].shape)}, weights {tuple(args[4].shape)}"
    assert_rounded(y, expected, terms(args[0], args[4].shape[3]), what)
    assert_rounded(joined, expected_joined, args[0].shape[2], what + ", joined")


@pytest.mark.parametrize("gated", [False, True], ids=["self-attention", "nonlin-attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lane", lanes(get("attention.stream")))
def test_attention(lane, dtype, gated):
    with lane.active():
        for frames, batch in CHUNKS:
            for context, heads, values in ((0, 1, 1), (3, 2, 5), (40, 4, 12), (17, 1, 144)):
                check_attention(*attention_arguments(frames, batch, 33, context, heads, values, gated, dtype))
        check_attention(*attention_arguments(4, 2, 9, 5, 2, 3, gated, dtype, bias=False))
        src, first, bias, context, *rest = attention_arguments(4, 2, 9, 5, 1, 6, gated, dtype)
        check_attention(src, first, bias, context.transpose(0, 1).contiguous().transpose(0, 1), *rest)


def test_gates_of_every_size():
    """tanh in one kernel is two formulas: small, at the seam, large."""
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    s = torch.cat([torch.linspace(-20, 20, 801), torch.linspace(-0.31, 0.31, 401), torch.tensor([0.0, 1e-20, -1e-6])])
    channels = len(s)
    projection = torch.zeros(3 * channels, 1)
    bias = torch.cat([s, torch.ones(2 * channels)])  # x and the factor after the average are 1
    context, weights = torch.zeros(0, 1, channels), torch.ones(1, 1, 1, 1)
    out = torch.zeros(1, channels)
    _, joined = stream_attention(
        torch.zeros(1, 1, 1), projection, bias, context, weights, out, None, True, backend="cpu"
    )
    torch.testing.assert_close(joined.flatten().double(), s.double().tanh(), rtol=4e-7, atol=0.0)


# ---- all three ----

OPS = {
    "swoosh_linear.feed_forward": feed_forward_arguments((2, 3), 8, 12, torch.float64),
    "conv_module.stream": conv_arguments(2, 3, 8, 5, torch.float64),
    "attention.stream": attention_arguments(2, 3, 8, 5, 2, 3, True, torch.float64),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("chosen", ["eager", "cpu"])
def test_opcheck(name, chosen):
    if backend.missing[chosen]:
        pytest.skip(backend.missing[chosen])
    operator = getattr(torch.ops.zipformer_kernels, get(name).name).default
    torch.library.opcheck(operator, (*OPS[name], chosen))


@pytest.mark.parametrize("name", OPS)
def test_auto_takes_the_kernel_for_few_rows_only(name):
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    op, (src, *rest) = get(name), OPS[name]
    more = src[:1].expand(FEW_ROWS.value // 3 + 1, 3, 8).contiguous()
    assert few_rows(src)
    assert not few_rows(more)
    assert op.select(None, src, *rest) == "cpu"
    assert op.select(None, more, *rest) == "eager"
    half = [x.half() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in (src, *rest)]
    assert op.select(None, *half) == "eager"


def test_no_frames():
    src, *rest = feed_forward_arguments((0, 2), 8, 12, torch.float32)
    assert infer_feed_forward(src, *rest).shape == (0, 2, 8)
    src, *rest = conv_arguments(0, 2, 8, 5, torch.float32)
    y, left = stream_conv_module(src, *rest)
    assert y.shape == (0, 2, 8)
    assert torch.equal(left, rest[2])
    src, *rest = attention_arguments(0, 2, 8, 5, 2, 3, False, torch.float32)
    y, joined = stream_attention(src, *rest)
    assert y.shape == (0, 2, 8)
    assert torch.equal(joined, rest[2])


def test_bad_input_is_named():
    src, *rest = feed_forward_arguments((2, 3), 8, 12, torch.float32)
    with pytest.raises(ValueError, match="out_weight must have shape"):
        infer_feed_forward(src[..., 1:], *rest)
    with pytest.raises(ValueError, match=r"in_bias must have shape \(12,\), got \(11,\)"):
        infer_feed_forward(src, rest[0], rest[1][1:], *rest[2:])
    with pytest.raises(ValueError, match="kind must be 'l' or 'r', got 'm'"):
        infer_feed_forward(src, *rest[:-1], "m")
    src, *rest = conv_arguments(2, 3, 8, 5, torch.float32)
    with pytest.raises(ValueError, match=r"left must have shape \(3, 8, 2\), got \(3, 8, 1\)"):
        stream_conv_module(src, *rest[:2], rest[2][..., 1:], *rest[3:])
    src, *rest = attention_arguments(2, 3, 8, 5, 2, 3, True, torch.float32)
    with pytest.raises(ValueError, match=r"weights must have shape \(2, 3, 2, 7\), got \(2, 3, 2, 6\)"):
        stream_attention(src, *rest[:3], rest[3][..., 1:], *rest[4:])
    with pytest.raises(ValueError, match="context must have a multiple of 4 heads' values"):
        stream_attention(src, *rest[:3], torch.cat([rest[3], rest[3]]), *rest[4:])


# ---- in the layer ----

LEFT = 6


def chunk(dtype=torch.float64, frames=4, batch=2):
    x, _, _ = arguments(dtype, frames, batch)
    position = normal(1, LEFT + 2 * frames - 1, SIZES["pos_dim"], dtype=dtype)
    key = SIZES["num_heads"] * SIZES["query_head_dim"]
    value = SIZES["num_heads"] * SIZES["value_head_dim"]
    embed = SIZES["embed_dim"]
    caches = [
        (LEFT, batch, key),
        (1, batch, LEFT, 3 * embed // 4),
        *[(LEFT, batch, value)] * 2,
        *[(batch, embed, 2)] * 2,
    ]
    padding = torch.zeros(batch, LEFT + frames, dtype=torch.bool)
    padding[:, :2] = True
    return x, position, *(normal(*shape, dtype=dtype) for shape in caches), LEFT, padding


def test_a_layer_gives_what_its_modules_give():
    for dtype in (torch.float32, torch.float64):
        module, args = layer(dtype, causal=True), chunk(dtype)
        expected = module.streaming_forward(*args)  # with gradients: module by module
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        with torch.no_grad():
            actual = module.streaming_forward(*args)
        for x, y in zip(actual, expected, strict=True):
            assert_agrees(x, y.detach(), PARITY[x.dtype])
            assert x.shape == y.shape
        for x, copy in zip(args, copies, strict=True):
            assert not isinstance(x, torch.Tensor) or torch.equal(x, copy)


def test_half_precision_runs_on_the_backend_asked_for():
    """The kernels for inference take none: the modules then go the long way instead of asking for them."""
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    for dtype in (torch.float16, torch.bfloat16):
        module = layer(dtype, causal=True)
        for inputs, function in ((chunk(dtype), module.streaming_forward), (arguments(dtype)[:2], module)):
            with torch.no_grad(), use_backend("cpu"):
                results = function(*inputs)
            with torch.no_grad(), use_backend("eager"):
                expected = function(*inputs)
            y, wanted = (x if isinstance(x, torch.Tensor) else x[0] for x in (results, expected))
            assert y.dtype == dtype
            assert ((y - wanted).float().norm() / wanted.float().norm()) < 8 * torch.finfo(dtype).eps


def test_any_strides():
    """Sequences first in memory, as features come."""
    args = chunk(torch.float32)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if torch.is_tensor(x) else x for x in args]
    assert not strided[0].is_contiguous()
    module = layer(torch.float32, causal=True)
    with torch.no_grad(), use_backend("eager" if backend.missing["cpu"] else "cpu"):
        for x, y in zip(module.streaming_forward(*strided), module.streaming_forward(*args), strict=True):
            assert_agrees(x, y, PARITY[x.dtype])
        settled = SettledBackend("eager" if backend.missing["cpu"] else "cpu")
        add = partial(module.conv_module1.one_kernel, settled, src_key_padding_mask=None)
        y = add(strided[0], strided[6])[0]
        assert_agrees(y, add(args[0], args[6])[0], PARITY[y.dtype])


def test_hooks_see_what_streams():
    module, args = layer(causal=True), chunk()
    names = called(module, lambda: module.streaming_forward(*args))
    assert {"feed_forward1.in_proj", "self_attn2.out_proj", "nonlin_attention.tanh", "conv_module1.out_proj"} <= names
    with torch.no_grad():
        assert called(module, lambda: module.streaming_forward(*args)) == names
