"""The passes of conv_module in a layer, from one projection's result to the next, against float64."""

import pytest
import torch
from lanes import lanes
from test_conv_module import arguments, differentiate
from tolerances import assert_rounded

from zipformer_kernels.ops.conv_module import BY_TORCH, _op
from zipformer_kernels.ops.conv_module.launchers import ConvLaunchers
from zipformer_kernels.ops.swoosh.reference import derivative, swoosh

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    (1, 1, 1, 1, None),
    (13, 3, 17, 5, None),
    (3, 2, 24, 31, None),
    (129, 2, 66, 15, None),
    (140, 1, 40, 31, None),
    (5, 2, 9, 5, 1),
    (23, 2, 33, 15, 4),
    (40, 1, 16, 7, 7),
    (140, 2, 26, 31, 32),
    (37, 2, 24, 31, -1),
    (50, 2, 12, 41, None),
    (110, 1, 10, 75, None),
    (60, 1, 34, 47, 20),
]
"""Frames, sequences, channels, taps, frames of a chunk or None."""

LANES = [lane for lane in lanes(_op) if isinstance(_op.backends[lane.values[0].backend], ConvLaunchers)]
NAMES = ("dprojected", "dweight", "dbias", "dcausal_weight", "dcausal_bias", "dedge_scale")
ALL = (True,) * 6


def made(frames, batch, channels, kernel, chunk, dtype=torch.float32, device="cpu", wide=torch.float32, **kwargs):
    """projected in `dtype`, and ``*conv`` with parameters in `wide`."""
    a, s, *conv = arguments(frames, batch, channels, kernel, chunk, device, **kwargs)
    conv = [x.detach().to(wide) if torch.is_tensor(x) and x.is_floating_point() else x for x in conv]
    return torch.cat([a, s], dim=2).detach().to(dtype), *conv


def wanted(conv):
    """Which gradients there are to want."""
    return tuple(x is not None for x in (True, *conv[:5]))


class Exact:
    """Everything in float64, and its sizes with every term positive, against which errors of sums are measured."""

    def __init__(self, projected, *conv, grad=None, y=None):
        args = [projected.double(), *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in conv)]
        args = [x.cpu() if torch.is_tensor(x) else x for x in args]
        a, s = args[0].chunk(2, dim=2)
        grad = torch.zeros_like(a) if grad is None else grad.double().cpu()
        if y is not None:
            grad = grad * derivative(y.double().cpu(), "r")
        self.y, self.gradients = self._of(a, s, args[1:], grad)
        sizes = [abs(x) if torch.is_tensor(x) and x.is_floating_point() else x for x in args[1:]]
        self.size, (joint, *rest) = self._of(a.abs(), s, sizes, grad.abs())
        # In ds, sigmoid(s) (1 - sigmoid(s)) cancels where the gate is open.
        da = joint[..., : a.shape[2]]
        self.sizes = [torch.cat([da, da * a.abs()], dim=2), *rest]

    @staticmethod
    def _of(a, s, conv, grad):
        y, (da, ds, *rest) = differentiate([a.detach().clone(), s.detach().clone(), *conv], grad)
        return y, [torch.cat([da, ds], dim=2), *rest]


def assert_close(actual, expected, terms, what, size, loose):
    """By the sums' rounding; torch's and Triton's round what goes into sums of half precision to it, too."""
    if not loose:
        return assert_rounded(actual, expected, terms, what, size)
    size = size.abs().clamp(min=size.square().mean().sqrt()) if size.numel() else size
    excess = (actual.double().cpu() - expected).abs() - 4 * torch.finfo(actual.dtype).eps * (size + expected.abs())
    assert actual.shape == expected.shape
    assert (excess <= 0).all(), f"{what}: off by {excess.max()} more than rounding explains"


def assert_gradients(lane, dtype, conv, exact, rows, dprojected, gradients, sums):
    loose = dtype != torch.float32
    taps = 2 * conv[0].shape[2] + 8
    assert dprojected.dtype == dtype
    assert dprojected.is_contiguous()
    assert_close(dprojected, exact.gradients[0], taps, NAMES[0], exact.sizes[0], loose)
    for i, (gradient, parameter) in enumerate(zip(gradients, conv[:5], strict=True), start=1):
        assert (gradient is None) == (parameter is None), NAMES[i]
        if gradient is None:
            continue
        assert gradient.dtype == parameter.dtype
        eps = torch.finfo(dtype).eps
        error = (gradient.double().cpu() - exact.gradients[i]).abs() - loose * 4 * eps * exact.sizes[i]
        assert_rounded(
            error.clamp(min=0).to(parameter.dtype), torch.zeros_like(error), rows + taps, NAMES[i], exact.sizes[i]
        )
    assert sums.dtype == torch.float32
    assert sums.shape[1:] == dprojected.shape[2:]
    total, size = dprojected.double().cpu().sum((0, 1)), exact.sizes[0].sum((0, 1))
    # Of dprojected before or after it is rounded.
    error = (sums.double().cpu().sum(0) - total).abs() - 2 * torch.finfo(dtype).eps * size
    assert_rounded(error.clamp(min=0).float(), torch.zeros_like(error), rows + taps, "sums", size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lane", LANES)
def test_forward(lane, dtype):
    torch.manual_seed(0)
    for case in CASES:
        projected, *conv = made(*case, dtype, lane.device)
        with lane.active():
            offered = _op.backends[lane.backend]
            y, a = offered.activated(projected, *conv, dtype, True)
            none, again = offered.activated(projected, *conv, dtype, False)
        exact = Exact(projected, *conv)
        assert none is None
        assert torch.equal(again, a)
        assert y.dtype == a.dtype == dtype
        assert_close(y, exact.y, 2 * case[3] + 8, "y", exact.size, dtype != torch.float32 and lane.backend != "cuda")
        # y may be rounded before it goes through SwooshR, or after; the function has a slope below 1.
        value, half = swoosh(exact.y, "r"), dtype != torch.float32
        assert_close(a, value, 2 * case[3] + 8, "a", exact.size + value.abs(), half)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lane", LANES)
def test_gradients(lane, dtype):
    torch.manual_seed(1)
    for case in CASES if lane.backend != "triton" or dtype == torch.float32 else CASES[::2]:  # simulation takes long
        frames, batch, channels = case[:3]
        projected, *conv = made(*case, dtype, lane.device)
        da = torch.randn(frames, batch, channels).to(dtype).to(lane.device)
        with lane.active():
            offered = _op.backends[lane.backend]
            y, a = offered.activated(projected, *conv, dtype, True)
            dprojected, gradients, again, sums = offered.activated_gradient(wanted(conv), da, y, projected, *conv)
            others = offered.gradient(wanted(conv), da, projected, *conv)
        assert again.dtype == dtype
        assert_close(again, a.double().cpu(), 1, "a", a.double().cpu().abs(), dtype != torch.float32)
        rows = frames * batch
        assert_gradients(lane, dtype, conv, Exact(projected, *conv, grad=da, y=y), rows, dprojected, gradients, sums)
        assert_gradients(lane, dtype, conv, Exact(projected, *conv, grad=da), rows, *others)


@pytest.mark.parametrize("lane", LANES)
def test_results_in_float32_of_half_precision(lane):
    """As in chunks under autocast, where the corrections of the edges are in float32."""
    torch.manual_seed(2)
    for case in ((23, 2, 34, 15, 4), (70, 2, 9, 7, None)):
        projected, *conv = made(*case, torch.bfloat16, lane.device)
        da = torch.randn(*case[:3]).to(lane.device)
        with lane.active():
            offered = _op.backends[lane.backend]
            y, a = offered.activated(projected, *conv, torch.float32, True)
            found = offered.activated_gradient(wanted(conv), da, y, projected, *conv)
        assert y.dtype == a.dtype == found[2].dtype == torch.float32
        exact = Exact(projected, *conv, grad=da, y=y)
        dprojected, gradients, _, sums = found
        assert_gradients(lane, torch.bfloat16, conv, exact, case[0] * case[1], dprojected, gradients, sums)


@pytest.mark.parametrize("lane", LANES)
def test_only_what_is_wanted(lane):
    torch.manual_seed(3)
    for chunk in (None, 5):
        projected, *conv = made(17, 2, 12, 5, chunk, torch.float32, lane.device)
        da = torch.randn(17, 2, 12, device=lane.device)
        with lane.active():
            offered = _op.backends[lane.backend]
            y, _ = offered.activated(projected, *conv, torch.float32, True)
            every = offered.activated_gradient(wanted(conv), da, y, projected, *conv)
            for needs in ((True, *(False,) * 5), (False, True, *(False,) * 4), (False, False, True, *(False,) * 3)):
                dprojected, gradients, a, sums = offered.activated_gradient(needs, da, y, projected, *conv)
                assert torch.equal(a, every[2])
                assert (dprojected is None) == (sums is None) == (not needs[0])
                assert dprojected is None or torch.equal(dprojected, every[0])
                for need, gradient, expected in zip(needs[1:], gradients, every[1], strict=True):
                    assert (gradient is None) == (not need)
                    assert gradient is None or torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("lane", LANES)
def test_no_rows(lane, shape):
    for chunk in (None, 2):
        projected, *conv = made(*shape, 5, chunk, torch.float32, lane.device, padded=False)
        with lane.active():
            offered = _op.backends[lane.backend]
            y, a = offered.activated(projected, *conv, torch.float32, True)
            dprojected, gradients, again, sums = offered.activated_gradient(wanted(conv), a, y, projected, *conv)
        assert y.shape == a.shape == again.shape == shape
        assert dprojected.shape == projected.shape
        assert all(gradient is None or not gradient.any() for gradient in gradients)
        assert not sums.any()


@pytest.mark.parametrize("lane", LANES)
def test_any_strides(lane):
    """Arguments that are no whole tensors give what dense ones give."""
    torch.manual_seed(4)
    projected, *conv = made(20, 3, 16, 7, None, torch.bfloat16, lane.device)
    da = torch.randn(20, 3, 16).to(torch.bfloat16).to(lane.device)

    def apart(x):
        return torch.stack([x, x], dim=3)[..., 0]

    def padded(x):
        return torch.cat([x, x], dim=2)[..., : x.shape[2]]

    with lane.active():
        offered = _op.backends[lane.backend]
        y, a = offered.activated(projected, *conv, torch.bfloat16, True)
        expected = offered.activated_gradient(wanted(conv), da, y, projected, *conv)
        for strided in (apart, padded):
            others = offered.activated(strided(projected), *conv, torch.bfloat16, True)
            found = offered.activated_gradient(wanted(conv), strided(da), strided(y), strided(projected), *conv)
            assert torch.equal(others[0], y)
            assert torch.equal(others[1], a)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[2], expected[2])


def test_plain_torch_serves_float64():
    projected, *conv = made(9, 2, 6, 5, 4, torch.float64, wide=torch.float64)
    y, a = BY_TORCH.activated(projected, *conv, torch.float64, True)
    dprojected, _, _, sums = BY_TORCH.activated_gradient(ALL, torch.ones_like(a), y, projected, *conv)
    assert_rounded(dprojected, Exact(projected, *conv, grad=torch.ones_like(a), y=y).gradients[0], 20, "dprojected")
    assert sums.dtype == torch.float64
