"""What is special to BiasNorm with the bypass after it: one after the other in float64, layouts, dtypes, and errors."""

import pytest
import torch
from contract import LAYOUTS, frozen, laid_out, subsets
from lanes import lanes
from tolerances import assert_rounded, relative_error, rounding

from zipformer_kernels import ops
from zipformer_kernels.core.backend import BackendError
from zipformer_kernels.ops.bias_norm import bias_norm_bypass

VARIANT = ops.get("bias_norm.bypass")
NAMES = ("dx", "dbias", "dlog_scale", "dsrc_orig", "dscale")
HALF = (torch.float16, torch.bfloat16)
EVERY = pytest.mark.parametrize("lane", lanes(VARIANT))


def arguments(*shape, by_sequence=False, device="cpu", dtypes=(torch.float32,) * 5):
    """x, bias, log_scale, src_orig, scale."""
    shapes = shape, shape[-1:], (), shape, shape[-2:] if by_sequence else shape[-1:]
    made = [torch.randn(size) * factor for size, factor in zip(shapes, (4.0, 0.5, 0.3, 1.0, 1.0), strict=True)]
    return [x.to(dtype).to(device).requires_grad_() for x, dtype in zip(made, dtypes, strict=True)]


def formula(x, bias, log_scale, src_orig, scale):
    y = x * log_scale.exp() / (x - bias).square().mean(-1, keepdim=True).sqrt()
    return src_orig + (y - src_orig) * scale


def exact(args, dy):
    """The formula's result and gradients in float64."""
    wide = [x.detach().double().cpu().requires_grad_() for x in args]
    y = formula(*wide)
    return [y, *torch.autograd.grad(y, wide, dy.detach().double().cpu())]


def run(lane, args, dy=None):
    """A result, a gradient for it, and those of the arguments that require one; None of the others."""
    with lane.active():
        y = bias_norm_bypass(*args)
        dy = torch.randn_like(y) if dy is None else dy
        wanted = [x for x in args if x.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy) if wanted else ())
    return y, dy, [next(found) if x.requires_grad else None for x in args]


def assert_matches(args, y, dy, grads):
    """Sums of parameters' gradients cancel: theirs are held against the whole of what is summed."""
    value, *expected = exact(args, dy)
    rows, size = y.numel() // max(y.shape[-1], 1), dy.double().norm().item()
    assert_rounded(y, value, y.shape[-1], "y", value.abs() + args[3].detach().double().cpu().abs())
    for name, actual, wanted, arg in zip(NAMES, grads, expected, args, strict=True):
        if actual is None:
            continue
        assert actual.shape == arg.shape
        assert actual.dtype == arg.dtype
        error = (actual.double().cpu() - wanted).norm().item()
        bound = rounding(torch.float32, y.shape[-1] + rows) + (rounding(arg.dtype) if arg.dtype in HALF else 0)
        assert error <= bound * max(wanted.norm().item(), size), name


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("shape", [(37, 3, 192), (3, 24), (2, 5, 3, 40), (150, 2, 768)])
@EVERY
def test_is_one_after_the_other(lane, shape, by_sequence):
    torch.manual_seed(0)
    args = arguments(*shape, by_sequence=by_sequence, device=lane.device)
    y, dy, grads = run(lane, args)
    assert_matches(args, y, dy, grads)
    if lane.backend != "eager":
        again, _, others = run(lane, args, dy)
        assert all(map(torch.equal, (again, *others), (y, *grads)))


@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY
def test_any_layout(lane, layout):
    torch.manual_seed(1)
    args, _ = laid_out(arguments(9, 3, 24, by_sequence=True, device=lane.device), LAYOUTS[layout])
    y, dy, grads = run(lane, args, torch.randn(24, device=lane.device).expand(9, 3, 24))
    assert y.stride() == torch.empty_like(args[0]).stride()
    assert_matches(args, y, dy, grads)


@EVERY
def test_frozen_arguments_get_no_gradient(lane):
    torch.manual_seed(2)
    for wanted in subsets(range(5)):
        args = frozen(arguments(9, 3, 24, by_sequence=True, device=lane.device), wanted)
        y, dy, grads = run(lane, args)
        assert y.requires_grad == bool(wanted)
        assert_matches(args, y, dy, grads)


@pytest.mark.parametrize("half", HALF)
@EVERY
def test_mixed_dtypes_promote(lane, half):
    wide = torch.float32
    for dtypes in ((half, wide, wide, wide, wide), (half, wide, wide, half, wide), (wide, wide, wide, half, half)):
        torch.manual_seed(3)
        args = arguments(9, 3, 24, device=lane.device, dtypes=dtypes)
        y, dy, grads = run(lane, args)
        assert y.dtype == wide
        assert_matches(args, y, dy, grads)
    args = arguments(9, 3, 24, device=lane.device, dtypes=(half,) * 5)
    y, dy, grads = run(lane, args)
    assert y.dtype == half
    value, *expected = exact(args, dy)
    for actual, wanted in zip((y, *grads), (value, *expected), strict=True):
        assert relative_error(actual.cpu(), wanted) <= rounding(half, 4)


@pytest.mark.parametrize("lane", lanes(VARIANT, "eager"))
def test_rows_of_any_magnitude(lane):
    torch.manual_seed(4)
    args = arguments(9, 1, 48, device=lane.device)
    sizes = torch.tensor([1e-36, 1e-25, 1e-18, 1e-12, 1.0, 1e12, 1e18, 1e25, 1e34], device=lane.device)
    with torch.no_grad():
        args[0].uniform_(0.5, 2).mul_(sizes[:, None, None])
        args[1].zero_()
    y, _, _ = run(lane, args)
    assert_matches(args, y, y, [None] * 5)


@pytest.mark.parametrize("lane", lanes(VARIANT, "eager", "cpu"))
def test_stores_its_arguments_and_one_number_per_row(lane):
    args, saved = arguments(5, 2, 24, device=lane.device), []
    with lane.active(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_norm_bypass(*args)
    assert [t.data_ptr() for t in saved[:5]] == [arg.data_ptr() for arg in args]
    assert [t.shape for t in saved[5:]] == [(5, 2)]


@pytest.mark.parametrize(("lane", "channels"), [(*p.values, c) for p in lanes(VARIANT) for c in (20, 1028, 2049)])
def test_rows_that_no_kernel_holds_are_refused(lane, channels):
    args = arguments(2, 2, channels, device=lane.device, dtypes=(torch.bfloat16, *(torch.float32,) * 4))
    if lane.backend in ("eager", "cpu") or (lane.backend == "triton" and channels < 2049):
        assert_matches(args, *run(lane, args))
        return
    with pytest.raises(BackendError, match=f"it takes .* channels.*, got {channels}"):
        run(lane, args)


def test_bad_input_is_named():
    x, bias, log_scale, src_orig, scale = (arg.detach() for arg in arguments(5, 3, 8))
    given = {"x": x, "bias": bias, "log_scale": log_scale, "src_orig": src_orig, "scale": scale}

    def raises(error, match, **changed):
        with pytest.raises(error, match=match):
            bias_norm_bypass(**given | changed)

    raises(TypeError, "src_orig must be a tensor, got list", src_orig=[1.0])
    raises(TypeError, r"scale must be floating-point, got torch\.int64", scale=scale.long())
    raises(ValueError, "src_orig must be on the device of x, cpu, got meta", src_orig=src_orig.to("meta"))
    raises(ValueError, r"x must have shape \(\.\.\., B, C\), got \(8,\)", x=x[0, 0])
    raises(ValueError, r"bias must have shape \(8,\), as x has 8 channels, got \(7,\)", bias=bias[1:])
    raises(ValueError, r"src_orig must have the shape of x, \(5, 3, 8\), got \(1, 3, 8\)", src_orig=src_orig[:1])
    raises(ValueError, r"scale must have shape \(8,\) or \(3, 8\), got \(1, 8\)", scale=scale[None])
