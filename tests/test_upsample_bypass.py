"""What is special to the bypass around a slower stack: its formula frame by frame, for `contract` too; bad input."""

from functools import partial

import contract
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lanes import lanes

from zipformer_kernels import modules, use_backend
from zipformer_kernels.core import backend as backends
from zipformer_kernels.ops.upsample_bypass import _op, upsample_bypass


def formula(src_orig, src, scale, mask, factor):
    """Frame by frame."""
    frames = []
    for t, own in enumerate(src_orig):
        one = src[t // factor] if mask is None else src[t // factor] * mask
        orig = torch.cat([own, own.new_zeros(own.shape[0], one.shape[1] - own.shape[1])], dim=1)
        frames.append(orig + (one - orig) * scale)
    return torch.stack(frames) if frames else src + 0 * scale + 0 * src_orig.sum()


def call(args):
    return upsample_bypass(*args[:3], args[4], args[3])


run = partial(contract.run, call)


def assert_matches(args, y, dy, grads, backend=None):
    exact, _, expected = contract.run(lambda args: formula(*args), contract.wide(args), dy.detach().double().cpu())
    bound = contract.TOLERANCE[y.dtype]
    assert y.is_contiguous()
    assert contract.relative(y, exact) <= bound
    floor = max(0.1 * dy.double().norm().item(), 1e-12)
    for i, grad in grads.items():
        assert grad.dtype == args[i].dtype
        assert contract.relative(grad, expected[i], floor) <= 3 * bound, f"gradient of argument {i}"


def arguments(frames, batch, channels, factor, narrower=0, by_sequence=False, device="cpu", dtype=torch.float32):
    scales = (batch, channels) if by_sequence else (channels,)
    shapes = (frames, batch, channels - narrower), (-(-frames // factor), batch, channels), scales
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 4), st.integers(1, 150), st.integers(1, 9)),
    share=st.floats(0.1, 1.0),
    masked=st.booleans(),
    by_sequence=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("lane", lanes(_op))
def test_any_shape(lane, sizes, share, masked, by_sequence, seed):
    torch.manual_seed(seed)
    _, batch, channels, factor = sizes
    args = arguments(*sizes, channels - max(1, int(share * channels)), by_sequence, lane.device)
    mask = torch.rand(batch, channels, device=lane.device) > 0.3 if masked else None
    with lane.active():
        y, dy, grads = run((*args, mask, factor))
    assert_matches((*args, mask, factor), y, dy, grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lane", lanes(_op))
def test_mixed_dtypes_promote(lane, dtype):
    for narrow in range(3):
        args = arguments(9, 2, 6, 2, device=lane.device)
        args[narrow] = args[narrow].detach().to(dtype).requires_grad_()
        with lane.active():
            y, dy, grads = run((*args, None, 2))
        assert y.dtype == torch.float32
        wide = [arg.detach().double().requires_grad_() for arg in args]
        exact = formula(*wide, None, 2)
        expected = torch.autograd.grad(exact, wide, dy.double())
        assert contract.relative(y, exact) <= contract.TOLERANCE[torch.float32]
        for i, (grad, wanted) in enumerate(zip(grads.values(), expected, strict=True)):
            assert grad.dtype == args[i].dtype
            assert contract.relative(grad, wanted) <= contract.TOLERANCE[grad.dtype]


@pytest.mark.parametrize("lane", lanes(_op))
def test_a_slice_of_channels_is_read_in_place(lane):
    wide, src, scale = arguments(11, 3, 20, 2, device=lane.device)
    args = wide.detach()[..., 4:13].requires_grad_(), src, scale, None, 2
    with lane.active():
        y, dy, grads = run(args)
    assert_matches(args, y, dy, grads)


def test_saves_its_arguments_only():
    args = arguments(6, 2, 5, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        upsample_bypass(*args, 2)
    assert [t.data_ptr() for t in saved] == [arg.data_ptr() for arg in args]


def test_bad_input_is_named():
    src_orig, src, scale = (arg.detach() for arg in arguments(6, 2, 5, 2))

    def raises(error, match, factor=2, mask=None, **changed):
        tensors = {"src_orig": src_orig, "src": src, "scale": scale} | changed
        with pytest.raises(error, match=match):
            upsample_bypass(*tensors.values(), factor, mask)

    raises(TypeError, "src_orig must be a tensor, got list", src_orig=[1.0])
    raises(TypeError, r"src must be floating-point, got torch\.int64", src=src.long())
    raises(ValueError, "scale must be on the device of src_orig, cpu, got meta", scale=scale.to("meta"))
    raises(ValueError, "factor must be at least 1, got 0", factor=0)
    raises(ValueError, r"src_orig must have shape \(T, B, C\), got \(2, 5\)", src_orig=src_orig[0])
    raises(ValueError, r"src must have shape \(2, 2, 5 or more\), got \(3, 2, 5\)", factor=3)
    raises(ValueError, r"src must have shape \(3, 2, 5 or more\), got \(3, 2, 4\)", src=src[..., 1:])
    raises(ValueError, r"scale must have shape \(5,\) or \(2, 5\), got \(4,\)", scale=scale[1:])
    raises(ValueError, r"mask must have shape \(2, 5\), got \(5,\)", mask=scale)


@pytest.mark.skipif(backends.missing["triton"] is not None, reason=f"triton: {backends.missing['triton']}")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the simulated kernels of Triton would run this, beside the CPU's"
)
def test_a_mask_reaches_the_bypass_beside_ways_of_the_cpu():
    """Where kernels of a GPU are simulated on tensors of the CPU, its ways without gradients could take them too."""
    torch.manual_seed(0)
    layer = modules.ZipformerEncoderLayer(16, 8, 2, 4, 2, 3, 16, cnn_module_kernel=5)
    inner = modules.ZipformerEncoder(layer, 1, pos_dim=8, dropout=0.0, warmup_begin=0.0, warmup_end=1.0)
    stack = modules.DownsampledZipformerEncoder(inner, 16, downsample=2, dropout=0.0, causal=False).eval()
    src, mask = torch.randn(5, 2, 16), (torch.rand(1, 2, 16) > 0.4).float()
    with torch.no_grad():
        with use_backend("eager"):
            expected = stack(src, feature_mask=mask)
        with use_backend("cpu,triton"):
            actual = stack(src, feature_mask=mask)
    assert (actual - expected).abs().max() < 1e-5
