"""The convolution module's middle in inference: bias of the projection, SwooshR and left context inside one kernel."""

import pytest
import torch
from lanes import lanes
from tolerances import assert_agrees, assert_rounded, rounding

from zipformer_kernels.ops import conv_module
from zipformer_kernels.ops.conv_module import infer_conv_module
from zipformer_kernels.ops.swoosh import swoosh_r

OP = conv_module._op.variants["infer"]
STREAMING = lanes(OP, "triton", "cuda")
"""Those that take a stream's left context."""


def arguments(frames, batch, channels, kernel, causal, dtype=torch.float64):
    def normal(*shape):
        return torch.randn(shape, dtype=dtype)

    parameters = [normal(channels, 1, kernel), normal(channels)]
    if causal:
        parameters += [normal(channels, 1, kernel // 2 + 1), normal(channels), normal(2, channels, kernel)]
    return normal(frames, batch, 2 * channels), normal(2 * channels), *parameters


def wide(values):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


@pytest.mark.parametrize("causal", [False, True], ids=["offline", "chunks"])
@pytest.mark.parametrize("lane", lanes(OP))
def test_matches_the_formula(lane, causal):
    for dtype in {torch.float32, torch.float64} & set(lane.dtypes):
        for frames, batch, channels, kernel in ((1, 1, 1, 1), (5, 2, 9, 7), (130, 1, 40, 15), (40, 3, 17, 31)):
            x, bias, *parameters = arguments(frames, batch, channels, kernel, causal, dtype)
            padding = torch.rand(batch, frames) > 0.7
            with lane.active():
                y, following = infer_conv_module(x, bias, *parameters, chunk_size=8, key_padding_mask=padding)
            a, gate = (x + bias).double().chunk(2, dim=2)
            exact = [*wide(parameters), *[None] * (5 - len(parameters))]
            rest = padding, min(8, frames), torch.float64
            expected = swoosh_r(conv_module.reference.conv_module(a, gate, *exact, *rest), backend="eager")
            # Sums cancel: errors are measured against the same sums of absolute values.
            sizes = [None if p is None else p.abs() for p in exact]
            size = conv_module.reference.conv_module(a.abs(), gate, *sizes, *rest)
            assert following is None
            assert y.dtype == dtype
            assert_rounded(y, expected, 2 * kernel, "y", size)


@pytest.mark.parametrize("lane", STREAMING)
def test_chunks_of_a_stream_are_the_whole(lane):
    """Chunk by chunk, with the left context handed on, gives what all chunks at once give."""
    for frames, chunk, kernel in ((24, 8, 5), (24, 4, 15), (12, 3, 31), (32, 32, 7)):
        x, bias, *parameters = arguments(frames, 2, 9, kernel, True)
        padding = torch.arange(frames) >= torch.tensor([[frames], [frames - 2]])
        left = torch.zeros(2, 9, kernel // 2, dtype=x.dtype)
        pieces = []
        with lane.active():
            expected, _ = infer_conv_module(x, bias, *parameters, chunk_size=chunk, key_padding_mask=padding)
            for first in range(0, frames, chunk):
                part = slice(first, first + chunk)
                y, left = infer_conv_module(x[part], bias, *parameters, key_padding_mask=padding[:, part], left=left)
                pieces.append(y)
        assert_agrees(torch.cat(pieces), expected, rounding(expected.dtype, 2 * kernel))


@pytest.mark.parametrize("lane", STREAMING)
def test_no_frames(lane):
    x, bias, *parameters = arguments(0, 2, 4, 5, True)
    left = torch.randn(2, 4, 2, dtype=x.dtype)
    with lane.active():
        y, following = infer_conv_module(x, bias, *parameters, left=left)
    assert y.shape == (0, 2, 4)
    assert torch.equal(following, left)


@pytest.mark.parametrize("lane", lanes(OP))
def test_opcheck(lane):
    x, bias, *parameters = arguments(6, 2, 4, 5, True, lane.dtypes[-1])
    for left in (None, torch.randn(2, 4, 2, dtype=x.dtype)):
        if left is not None and lane.backend in ("triton", "cuda"):
            continue
        with lane.active():
            args = (x, bias, left, *parameters, None, 6, lane.backend)
            torch.library.opcheck(torch.ops.zipformer_kernels.conv_module_infer.default, args)


def test_bad_input_is_named():
    x, bias, *parameters = arguments(6, 2, 4, 5, True)
    with pytest.raises(ValueError, match="x must have 8 channels, twice those of weight"):
        infer_conv_module(x[..., 1:], bias, *parameters)
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        infer_conv_module(x, bias, *parameters, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="left must have shape"):
        infer_conv_module(x, bias, *parameters, left=torch.zeros(2, 4, 3))
