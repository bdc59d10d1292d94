"""The conv embed against upstream's: eval, training steps under seeds, and bad input."""

import pytest
import torch
import upstream
from draws import set_batch_count
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_same_run, build_pair
from tolerances import PARITY

from zipformer_kernels.modules import Conv2dSubsampling


def pair(bins=20, dtype=torch.float64, **kwargs):
    their_class = upstream.subsampling.Conv2dSubsampling
    return build_pair(Conv2dSubsampling, their_class, bins, 12, 4, 8, 6, dtype=dtype, **kwargs)


def batch(lengths, bins=20, dtype=torch.float64):
    return [torch.randn(len(lengths), max(lengths), bins, dtype=dtype), torch.tensor(lengths)]


@settings(max_examples=8)
@given(st.integers(7, 24), st.lists(st.integers(9, 40), min_size=1, max_size=3))
def test_eval(bins, lengths):
    ours, theirs = pair(bins)
    assert_same_run(ours.eval(), theirs.eval(), batch(lengths, bins))


def test_eval_float32():
    ours, theirs = pair(dtype=torch.float32)
    args = batch([40, 31], dtype=torch.float32)
    with torch.no_grad():
        assert_same_run(ours.eval(), theirs.eval(), args)
    # The convolutions' gradients are sums over all frames and bins that mostly cancel.
    assert_same_run(ours, theirs, args, tolerance=10 * PARITY[torch.float32])


@pytest.mark.parametrize("batch_count", [None, 0, 100, 5000, 30000])
def test_training(batch_count):
    ours, theirs = pair(dropout=0.2)
    for model in (ours.train(), theirs.train()):
        set_batch_count(model, batch_count)
    for seed in range(5):
        assert_same_run(ours, theirs, batch([40, 31, 25]), seed=seed)


@pytest.mark.parametrize(
    ("x", "x_lens", "message"),
    [
        (torch.zeros(2, 8, 20), torch.tensor([8, 8]), "x: .* at least 9 frames"),
        (torch.zeros(2, 30, 21), torch.tensor([30, 8]), r"x: wanted \(batch, frames, 20\)"),
        (torch.zeros(2, 30, 20), torch.tensor([30]), "x_lens: wanted one length for each of 2"),
        (
            torch.zeros(2, 30, 20),
            torch.tensor([27, 20]),
            "x_lens: .* got 10 output frames for it and 11 for x",
        ),
    ],
)
def test_bad_input(x, x_lens, message):
    with pytest.raises(ValueError, match=message):
        Conv2dSubsampling(20, 12)(x, x_lens)


@pytest.mark.parametrize("lengths", [[30, 30], (30, 30), 30, None])
def test_lengths_that_are_no_tensor(lengths):
    embed = Conv2dSubsampling(20, 12)
    message = f"x_lens: wanted a tensor of 2 lengths, got {type(lengths).__name__}"
    with pytest.raises(TypeError, match=message):
        embed(torch.zeros(2, 30, 20), lengths)
    with pytest.raises(TypeError, match=message):
        embed.streaming_forward(torch.zeros(2, 30, 20), lengths, embed.get_init_states(2))


def test_bad_configuration():
    with pytest.raises(ValueError, match="in_channels must be at least 7, got 6"):
        Conv2dSubsampling(6, 12)


def test_streaming_refuses_a_cache_of_the_wrong_length():
    embed = Conv2dSubsampling(20, 12)
    with pytest.raises(ValueError, match="cached_left_pad: wanted 3 frames"):
        embed.streaming_forward(torch.zeros(1, 29, 20), torch.tensor([29]), embed.get_init_states(1)[:, :, :2])
