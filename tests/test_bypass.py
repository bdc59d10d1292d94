"""What is special to the bypass: its float64 formula, for `contract` too, mixed dtypes, and the module on it."""

import random
from contextlib import nullcontext
from functools import partial

import contract
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lanes import Lane, lanes
from tolerances import assert_agrees, assert_rounded, relative_error, rounding

from zipformer_kernels.modules import BiasNorm, BypassModule
from zipformer_kernels.modules.bypass import norm_and_bypass
from zipformer_kernels.ops.bias_norm import one_pass_backend
from zipformer_kernels.ops.bypass import _op, bypass, limited_gradient, random_scale

NAMES = ("dsrc_orig", "dsrc", "dscale")
HALF = (torch.float16, torch.bfloat16)


def formula(a, b, c):
    return a + (b - a) * c


def call(args):
    return bypass(*args)


run = partial(contract.run, call)


def assert_matches(args, y, dy, grads, backend=None):
    """Against float64. Terms cancel, so errors are measured against sums of their absolute values.

    On eager in half precision, which is rounded after each operation, against the RMS.
    """
    a, b, c, g = (x.detach().double().cpu() for x in (*args, dy))
    value, expected = formula(a, b, c), (g - g * c, g * c, (g * (b - a)).sum_to_size(c.shape))
    a, b, c, g = (x.abs() for x in (a, b, c, g))
    size, sizes = a + (a + b) * c, (g + g * c, g * c, (g * (a + b)).sum_to_size(c.shape))
    terms = 1, 1, a.numel() // max(c.numel(), 1) + 1
    assert y.dtype == args[0].dtype
    assert y.stride() == torch.empty_like(args[0]).stride()
    for i, grad in grads.items():
        assert grad.dtype == args[i].dtype
    if backend == "eager" and y.dtype in HALF:
        assert relative_error(y, value) <= rounding(y.dtype)
        assert all(relative_error(grad, expected[i]) <= rounding(y.dtype) for i, grad in grads.items())
        return
    assert_rounded(y, value, 1, "y", size)
    for i, grad in grads.items():
        assert_rounded(grad, expected[i], terms[i], NAMES[i], sizes[i])


def arguments(*shape, by_sequence=False, device="cpu", dtype=torch.float32):
    shapes = shape, shape, shape[-2:] if by_sequence else shape[-1:]
    return [torch.randn(size, device=device, dtype=dtype).requires_grad_() for size in shapes]


@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 9), st.integers(0, 200)),
    by_sequence=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(_op))
def test_any_shape(lane, shape, by_sequence, seed):
    torch.manual_seed(seed)
    args = arguments(*shape, by_sequence=by_sequence, device=lane.device)
    with lane.active():
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("shape", [(6, 5), (2, 7, 3, 5)])
@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("lane", lanes(_op))
def test_other_numbers_of_dimensions(lane, by_sequence, shape):
    args = arguments(*shape, by_sequence=by_sequence, device=lane.device)
    with lane.active():
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("lane", lanes(_op, "eager"))
def test_the_same_inputs_give_the_same_bits_on_any_number_of_threads(lane, by_sequence):
    torch.manual_seed(3)
    for channels in (91, 700):
        args = arguments(203, 3, channels, by_sequence=by_sequence, device=lane.device)
        dy = torch.randn_like(args[0])
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                with lane.active():
                    y, _, grads = run(args, dy)
                results.append((y, *grads.values()))
        finally:
            torch.set_num_threads(threads)
        for result in results:
            assert all(map(torch.equal, result, results[0]))


def test_saves_its_arguments_only():
    args = arguments(5, 2, 9)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bypass(*args)
    assert [t.data_ptr() for t in saved] == [arg.data_ptr() for arg in args]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lane", lanes(_op))
def test_mixed_dtypes_promote(lane, dtype):
    """As under autocast, which narrows src. Gradients have the dtypes of what they are of."""
    for dtypes in [(dtype, dtype, torch.float32), (dtype, torch.float32, dtype), (torch.float32, dtype, torch.float32)]:
        args = arguments(6, 2, 5, device=lane.device)
        args = [arg.detach().to(kind).requires_grad_() for arg, kind in zip(args, dtypes, strict=True)]
        with lane.active():
            y, dy, grads = run(args)
        assert y.dtype == torch.float32
        if lane.backend == "eager":
            assert torch.equal(y, formula(*args))
        wide = [arg.detach().double().requires_grad_() for arg in args]
        wanted = formula(*wide)
        expected = [wanted, *torch.autograd.grad(wanted, wide, dy.double())]
        for actual, other, arg in zip([y, *grads.values()], expected, [y, *args], strict=True):
            assert actual.dtype == arg.dtype
            # eager takes src - src_orig in their dtype
            narrowest = min(dtypes, key=lambda kind: kind.itemsize) if lane.backend == "eager" else arg.dtype
            assert relative_error(actual, other) <= rounding(narrowest, 12)


def test_bad_input_is_named():
    src_orig, src, scale = (arg.detach() for arg in arguments(5, 3, 4))

    def raises(error, match, **changed):
        with pytest.raises(error, match=match):
            bypass(**{"src_orig": src_orig, "src": src, "scale": scale} | changed)

    raises(TypeError, "src_orig must be a tensor, got list", src_orig=[1.0])
    raises(TypeError, "scale must be a tensor, got float", scale=0.5)
    raises(TypeError, r"src must be floating-point, got torch\.int64", src=src.long())
    raises(ValueError, r"src_orig must have shape \(\.\.\., B, C\), got \(4,\)", src_orig=src_orig[0, 0])
    raises(ValueError, r"src must have the shape of src_orig, \(5, 3, 4\), got \(1, 3, 4\)", src=src[:1])
    raises(ValueError, r"scale must have shape \(4,\) or \(3, 4\), got \(3,\)", scale=scale[:3])
    raises(ValueError, r"scale must have shape .*, got \(1, 4\)", scale=scale[None])
    raises(ValueError, "scale must be on the device of src_orig, cpu, got meta", scale=scale.to("meta"))


def module(rate):
    made = BypassModule(24, skip_rate=rate, straight_through_rate=rate)
    made.bypass_scale.data.uniform_(0.0, 1.2)
    return made


def differentiate(call, args):
    """The result of a call and its gradients, with the draws of one seed."""
    random.seed(1)
    torch.manual_seed(1)
    y = call()
    return [y, *torch.autograd.grad(y, args, torch.ones_like(y))]


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lane", lanes(_op))
def test_module_mixes_as_the_formula_does(lane, training, rate):
    made = module(rate).train(training)
    args = [*arguments(33, 5, 24, device=lane.device)[:2], made.bypass_scale]
    seen = []
    hook = made.register_forward_hook(lambda *call: seen.append(call))
    with lane.active():
        ours = differentiate(lambda: made(*args[:2]), args)
    hook.remove()
    assert len(seen) == 1
    expected = differentiate(lambda: formula(*args[:2], made.drawn_scale(5)), args)
    for actual, wanted in zip(ours, expected, strict=True):
        assert relative_error(actual, wanted) <= rounding(torch.float32, 33 * 5)


@pytest.mark.parametrize("request_", ["auto", "eager", "cpu", "triton", "cuda"])
def test_module_runs_where_the_op_has_no_kernels(request_):
    """On backends that have none, and on mixed dtypes."""
    device = "cpu" if request_ == "auto" else Lane(request_).device
    made = module(0.4).to(device)
    a, b = (arg.detach() for arg in arguments(7, 3, 24)[:2])
    for args in ((a, b), (a.bfloat16(), b), (a, b.bfloat16()), (a.bfloat16(), b.bfloat16())):
        with nullcontext() if request_ == "auto" else Lane(request_).active():
            assert made(*(arg.to(device) for arg in args)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_module_is_recorded_as_plain_torch():
    made = module(0.0).eval()
    short, long = (tuple(arg.detach() for arg in arguments(frames, 3, 24)[:2]) for frames in (7, 11))
    traced = torch.jit.trace(made, short)
    assert all(node.kind().startswith(("aten::", "prim::")) for node in traced.graph.nodes())
    assert_agrees(traced(*long), made(*long), rounding(torch.float32))


# ---- what training does to scales ----


def lanes_of(variant):
    return [pytest.param(Lane(name), id=name) for name in _op.variants[variant].backends]


@pytest.mark.parametrize("rates", [(0.4, None), (None, 0.3), (0.4, 0.3)])
@pytest.mark.parametrize("lane", lanes_of("scale"))
def test_random_scales_are_the_formula(lane, rates):
    """Scales of exactly 0 and 1 among them: the gradient of a maximum of equals goes by halves."""
    torch.manual_seed(3)
    scale = torch.tensor([0.0, 1.0, -0.5, 0.5, 1.5], device=lane.device, requires_grad=True)
    skips, straight = (rate if rate is None else torch.rand(40, 1, device=lane.device) for rate in rates)
    expected = scale if skips is None else scale * (skips > rates[0])
    if straight is not None:
        expected = torch.maximum(expected, (straight < rates[1]).float())
    with lane.active():
        y = random_scale(scale, skips, straight, rates[0] or 0.0, rates[1] or 0.0, 40)
        dy = torch.randn_like(y)
        (actual,) = torch.autograd.grad(y, scale, dy)
    assert torch.equal(y, expected)
    (wanted,) = torch.autograd.grad(expected, scale, dy)
    assert_agrees(actual, wanted, rounding(torch.float32, 40))


@pytest.mark.parametrize("shape", [(), (0,), (300,), (3, 2, 7)])
@pytest.mark.parametrize("lane", lanes_of("limit"))
def test_limits_turn_what_points_outwards(lane, shape):
    torch.manual_seed(4)
    x, grad = (torch.randn(shape, device=lane.device) for _ in range(2))
    with lane.active():
        actual = limited_gradient(grad, x, -0.3, 0.4)
    outwards = ((grad > 0) & (x < -0.3)) | ((grad < 0) & (x > 0.4))
    assert torch.equal(actual, torch.where(outwards, -grad, grad))
    assert x.numel() < 7 or 0 < outwards.sum() < x.numel()


def test_what_no_kernel_takes_runs_in_pytorch():
    """Whatever is asked for: a parameter in float64 must not stop a training step."""
    scale = torch.rand(5, dtype=torch.float64)
    lane = Lane("triton")
    with lane.active():
        assert random_scale(scale, torch.ones(2, 1), None, 0.5, 0.0, 2).dtype == torch.float64
        assert limited_gradient(scale, scale, 0.0, 1.0).dtype == torch.float64


def test_bad_scales_and_limits_are_named():
    scale, draws = torch.rand(5), torch.rand(3, 1)
    with pytest.raises(ValueError, match=r"scale must have shape \(C,\), got \(1, 5\)"):
        random_scale(scale[None], draws, None, 0.5, 0.0, 3)
    with pytest.raises(ValueError, match=r"straight must have shape \(4, 1\), got \(3, 1\)"):
        random_scale(scale, None, draws, 0.0, 0.5, 4)
    with pytest.raises(TypeError, match="skips must be a tensor, got list"):
        random_scale(scale, [0.1], None, 0.5, 0.0, 1)
    with pytest.raises(ValueError, match=r"x must have the shape of grad, \(5,\), got \(3, 1\)"):
        limited_gradient(scale, draws, 0.0, 1.0)
    with pytest.raises(TypeError, match=r"x must be floating-point, got torch\.int64"):
        limited_gradient(scale, scale.long(), 0.0, 1.0)


# ---- the norm before it ----


@pytest.mark.parametrize("name", ["eager", "cpu", "triton", "cuda"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("training", [False, True])
def test_norm_and_bypass_is_one_after_the_other(name, rate, training):
    lane = Lane(name)
    made, norm = module(rate).train(training).to(lane.device), BiasNorm(24).train(training).to(lane.device)
    norm.bias.data.normal_()
    norm.log_scale.data.fill_(1.6)  # beyond its limit
    args = [*arguments(33, 5, 24, device=lane.device)[:2], made.bypass_scale, norm.bias, norm.log_scale]
    with lane.active():
        results, states = [], []
        for call in (lambda: norm_and_bypass(norm, made, *args[:2]), lambda: made(args[0], norm(args[1]))):
            results.append(differentiate(call, args))
            states.append((random.getstate(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]
    for actual, wanted in zip(*results, strict=True):
        assert relative_error(actual, wanted) <= rounding(torch.float32, 33 * 5)


def test_norm_and_bypass_takes_one_pass_where_kernels_serve():
    x = torch.randn(7, 3, 24)
    args = x, torch.zeros(24), torch.zeros(()), x, torch.rand(24)
    for name, expected in (("eager", None), ("cpu", None), ("triton", "triton"), ("cuda", "cuda")):
        lane = Lane(name)
        with lane.active():
            assert one_pass_backend(*(x.to(lane.device) for x in args)) == expected
            assert one_pass_backend(*(x.double().to(lane.device) for x in args)) is None


def test_norm_and_bypass_names_bad_input():
    x = torch.randn(7, 3, 24)
    with pytest.raises(ValueError, match="x: wanted 24 channels along dimension -1"):
        norm_and_bypass(BiasNorm(24), module(0.0), x, x[..., 1:])
    with pytest.raises(ValueError, match="src"):
        norm_and_bypass(BiasNorm(24), module(0.0), x[1:], x)
