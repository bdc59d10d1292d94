"""What is special to conv_module: its float64 formula, for `contract` too, lengths, padding, chunks and autocast."""

from functools import partial

import contract
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lanes import lanes
from tolerances import assert_rounded, relative_error, rounding

from zipformer_kernels.core import backend
from zipformer_kernels.ops.conv_module import _op, chunk_conv_module, conv_module

NAMES = ("da", "ds", "dweight", "dbias", "dcausal_weight", "dcausal_bias", "dedge_scale")


def formula(a, s, weight, bias, causal_weight, causal_bias, edge_scale, padding, chunk_size):
    """The op written as sums over taps, each with its own mask."""
    frames, half = a.shape[0], weight.shape[2] // 2
    x = a * torch.sigmoid(s)
    if padding is not None:
        x = torch.where(padding.t().unsqueeze(-1), 0.0, x)
    x = F.pad(x, (0, 0, 0, 0, half, half))
    t = torch.arange(frames)

    def taps(weight, bias, chunk=None):
        y = torch.zeros_like(a) if bias is None else torch.zeros_like(a) + bias
        for k in range(weight.shape[2]):
            term = x[k : k + frames] * weight[:, 0, k]
            if chunk is not None:
                same = t // chunk == (t + k - half).div(chunk, rounding_mode="floor")
                term = torch.where(same[:, None, None], term, 0.0)
            y = y + term
        return y

    if causal_weight is None:
        return taps(weight, bias)
    kernel = weight.shape[2]
    chunk = max(frames, 1) if chunk_size < 0 or chunk_size > frames else chunk_size
    position = t % chunk
    from_right = position - chunk + kernel
    left, right = edge_scale.transpose(1, 2)
    factor = 1.0 + torch.where((position < kernel)[:, None], left[position.clamp(max=kernel - 1)], 0.0)
    factor = factor + torch.where((from_right >= 0)[:, None], right[from_right.clamp(min=0)], 0.0)
    return taps(causal_weight, causal_bias) + taps(weight, bias, chunk) * factor[:, None, :]


def call(args):
    """The public function for the op's arguments."""
    a, s, weight, bias, causal_weight, causal_bias, edge_scale, padding, chunk_size, *_ = args
    if causal_weight is None:
        return conv_module(a, s, weight, bias, padding)
    return chunk_conv_module(a, s, weight, bias, causal_weight, causal_bias, edge_scale, chunk_size, padding)


run = partial(contract.run, call)


def differentiate(args, dy):
    leaves = [None if arg is None else arg.requires_grad_() for arg in args[:7]]
    y = formula(*leaves, *args[7:9])
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True))
    return y.detach(), [None if leaf is None else next(found) for leaf in leaves]


def assert_matches(args, y, dy, grads, backend=None, dtype=None):
    """Against float64. Sums cancel: errors are measured against the same sums of absolute values.

    On triton the gated input is rounded to half precision too, as upstream's is; eager's convolutions in half
    precision are torch's own.
    """
    dtype = dtype or args[0].dtype
    exact = [arg.detach().double().cpu() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args]
    exact[7] = None if args[7] is None else args[7].cpu()
    dy = dy.detach().double().cpu()
    value, expected = differentiate(exact, dy)
    # With every term positive. In ds, sigmoid(s) (1 - sigmoid(s)) cancels where the gate is open.
    sizes = [abs(arg.detach()) if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in exact]
    sizes[1] = exact[1].detach()
    size, gradient_sizes = differentiate(sizes, dy.abs())

    gradient_sizes[1] = gradient_sizes[0] * sizes[0].detach()

    frames, batch, _ = args[0].shape
    taps = 2 * args[2].shape[2]
    half = backend in ("eager", "triton") and torch.finfo(args[0].dtype).bits == 16
    assert y.dtype == dtype
    assert y.shape == args[0].shape
    if half and backend == "eager":
        return
    check(y, value, taps, "y", size, half, args[0].dtype)
    for i, grad in grads.items():
        assert grad.dtype == args[i].dtype
        terms = taps if i < 2 else frames * batch + taps
        check(grad, expected[i], terms, NAMES[i], gradient_sizes[i].abs(), half, args[0].dtype)


def check(actual, expected, terms, what, size, half, dtype):
    if not half:
        return assert_rounded(actual, expected, max(terms, 1), what, size)
    error = (actual.detach().double().cpu() - expected).abs()
    allowed = 2 * torch.finfo(dtype).eps * (size + expected.abs()) + torch.finfo(dtype).smallest_normal
    assert actual.shape == expected.shape
    assert (error <= allowed).all(), f"{what}: off by {(error / allowed).max():.2f} of what rounding explains"


def leaf(*shape, device="cpu", dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(device).requires_grad_()


def arguments(frames, batch, channels, kernel, chunk=None, device="cpu", dtype=torch.float32, padded=True):
    """The op's tensor arguments and the chunk size."""
    made = {"device": device, "dtype": dtype}
    causal = (None, None, None)
    if chunk is not None:
        causal = (
            leaf(channels, 1, kernel // 2 + 1, **made),
            leaf(channels, **made),
            leaf(2, channels, kernel, scale=0.5, **made),
        )
    padding = torch.rand(batch, frames, device=device) > 0.7 if padded else None
    a, s = leaf(frames, batch, channels, **made), leaf(frames, batch, channels, scale=3, **made)
    weights = leaf(channels, 1, kernel, **made), leaf(channels, **made)
    return [a, s, *weights, *causal, padding, -1 if chunk is None else chunk]


@given(
    frames=st.integers(0, 24),
    batch=st.integers(0, 3),
    channels=st.integers(1, 40),
    half=st.integers(0, 5),
    chunk=st.none() | st.integers(-1, 12).filter(bool),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(_op))
def test_any_shape(lane, frames, batch, channels, half, chunk, seed):
    torch.manual_seed(seed)
    args = arguments(frames, batch, channels, 2 * half + 1, chunk, lane.device)
    with lane.active():
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("frames", [1, 2, 14, 127, 128, 129, 257])
@pytest.mark.parametrize("lane", lanes(_op))
def test_lengths_around_the_kernel_and_the_tile(lane, frames):
    torch.manual_seed(1)
    for chunk in (None, 50, -1):
        args = arguments(frames, 1, 9, 15, chunk, lane.device)
        with lane.active():
            y, dy, grads = run(args)
        assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("lane", lanes(_op))
def test_what_lies_on_padding_does_not_matter(lane, chunk):
    torch.manual_seed(3)
    args = arguments(12, 2, 8, 5, chunk, lane.device)
    noisy = list(args)
    on_padding = args[7].t().unsqueeze(-1)
    for i in (0, 1):
        noisy[i] = torch.where(on_padding, torch.nan, args[i].detach()).requires_grad_()
    with lane.active():
        y, dy, grads = run(args)
        again, _, grads_again = run(noisy, dy)
    assert torch.equal(y, again)
    for i in grads:
        if i >= 2 or lane.backend != "eager":  # torch's own gradient of a product with NaN is NaN
            assert torch.equal(grads[i], grads_again[i]), NAMES[i]
    assert (grads[0][args[7].t()] == 0).all()
    assert (grads[1][args[7].t()] == 0).all()


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("lane", lanes(_op))
def test_autocast_is_what_it_is_to_the_convolution(lane, chunk):
    """A convolution in autocast's dtype; chunks are scaled in the dtype of the scale."""
    torch.manual_seed(5)
    args = arguments(17, 2, 24, 7, chunk, lane.device)
    for i in (0, 1):
        args[i] = args[i].detach().to(torch.bfloat16).requires_grad_()
    with lane.active(), torch.autocast(lane.device.type, torch.bfloat16):
        y, dy, grads = run(args)
    dtype = torch.bfloat16 if chunk is None else torch.float32
    assert_matches(args, y, dy, grads, lane.backend, dtype)


@pytest.mark.parametrize("lane", lanes(_op, "triton", "cuda"))
def test_autocast_leaves_float64_alone(lane):
    args = arguments(5, 2, 4, 3, dtype=torch.float64)
    with lane.active(), torch.autocast("cpu", torch.bfloat16):
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("lane", lanes(_op, "eager"))
def test_the_same_inputs_give_the_same_bits_on_any_number_of_threads(lane, chunk):
    torch.manual_seed(6)
    args = arguments(300, 2, 40, 15, chunk, lane.device)
    dy = torch.randn(300, 2, 40, device=lane.device)
    threads = torch.get_num_threads()
    try:
        with lane.active():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                y, _, grads = run(args, dy)
                if count == 1:
                    first = y, grads
                assert torch.equal(y, first[0])
                assert all(torch.equal(grads[i], first[1][i]) for i in grads)
    finally:
        torch.set_num_threads(threads)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("lane", lanes(_op))
def test_compiles_without_graph_breaks(lane):
    torch.manual_seed(7)
    shared = arguments(1, 1, 8, 5, 3, lane.device)

    def function(a, s, padding):
        y = conv_module(a, s, *shared[2:4], padding)
        return chunk_conv_module(y, s, *shared[2:7], 3, padding)

    with lane.active():
        for cast in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            for frames, batch in ((5, 2), (7, 3), (11, 2)):
                args = arguments(frames, batch, 8, 5, device=lane.device)
                a, s = (arg.detach().to(torch.bfloat16 if cast else torch.float32).requires_grad_() for arg in args[:2])
                with torch.autocast(lane.device.type, torch.bfloat16, enabled=cast):
                    y, wanted = compiled(a, s, args[7]), function(a, s, args[7])
                assert y.dtype == wanted.dtype == torch.float32
                inputs = (a, s, *shared[2:7])
                dy = torch.randn_like(y)
                grads, expected = (torch.autograd.grad(result, inputs, dy) for result in (y, wanted))
                for grad, other in zip(grads, expected, strict=True):
                    assert relative_error(grad, other) <= rounding(a.dtype, frames * batch)  # sums over frames


def test_saves_its_arguments_only():
    args = arguments(9, 2, 8, 3, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(args)
    assert [t.data_ptr() for t in saved] == [arg.data_ptr() for arg in args[:8]]


def test_calls_that_kernels_do_not_serve_say_why():
    if backend.missing["cpu"]:
        pytest.skip(backend.missing["cpu"])
    args = arguments(5, 2, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(args).dtype == torch.bfloat16
        message = r"takes torch\.float32 to itself or float32 only, not to torch\.bfloat16"
        with pytest.raises(backend.BackendError, match=message):
            conv_module(*args[:4], backend="cpu")


def test_bad_input_is_named():
    args = [arg.detach() if torch.is_tensor(arg) else arg for arg in arguments(6, 2, 4, 5, 3)]
    a, s, weight, bias, causal_weight, causal_bias, edge_scale, padding, chunk = args

    def raises(error, match, **changed):
        given = {"a": a, "s": s, "weight": weight, "bias": bias, "causal_weight": causal_weight}
        given |= {"causal_bias": causal_bias, "edge_scale": edge_scale, "chunk_size": chunk}
        with pytest.raises(error, match=match):
            chunk_conv_module(**given | {"key_padding_mask": padding} | changed)

    raises(TypeError, "a must be a tensor, got list", a=[1.0])
    raises(TypeError, "weight must be a tensor, got NoneType", weight=None)
    raises(TypeError, r"s must be floating-point, got torch\.int64", s=s.long())
    raises(
        TypeError,
        r"key_padding_mask must be a tensor of bools or integers, got torch\.float32",
        key_padding_mask=padding.float(),
    )
    raises(TypeError, r"weight must be of the dtype of a, torch\.float32, .*torch\.float16", weight=weight.half())
    raises(ValueError, r"a must have shape \(T, batch, channels\), got \(6, 8\)", a=a.reshape(6, 8))
    raises(ValueError, r"s must be as a, \(6, 2, 4\) in torch\.float32, got \(5, 2, 4\)", s=s[1:])
    raises(ValueError, r"weight must have shape \(4, 1, taps\), got \(4, 5\)", weight=weight[:, 0])
    raises(ValueError, "weight must have an odd number of taps, got 4", weight=weight[..., :4])
    raises(
        ValueError, r"causal_weight must have shape \(4, 1, 3\), got \(4, 1, 2\)", causal_weight=causal_weight[..., :2]
    )
    raises(ValueError, r"bias must have shape \(4,\), got \(3,\)", bias=bias[:3])
    raises(ValueError, r"edge_scale must have shape \(2, 4, 5\), got \(1, 4, 5\)", edge_scale=edge_scale[:1])
    raises(ValueError, r"key_padding_mask must have shape \(2, 6\), got \(6, 2\)", key_padding_mask=padding.t())
    raises(ValueError, "chunk_size must not be 0", chunk_size=0)
    raises(ValueError, "bias must be on the device of a, cpu, got meta", bias=bias.to("meta"))


@pytest.mark.gpu("2^31 elements and more")
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_more_elements_than_32_bits_count(name):
    frames = 2**31 // 512 + 200
    a = torch.ones(1, 1, 512, device="cuda", dtype=torch.float16).repeat(frames, 1, 1).requires_grad_()
    weight = leaf(512, 1, 3, device="cuda", dtype=torch.float16)
    y = conv_module(a, a, weight, backend=name)
    assert torch.equal(y[-2], y[1])
    (da,) = torch.autograd.grad(y, a, torch.ones_like(y))
    assert torch.equal(da[-2], da[1])
