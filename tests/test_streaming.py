"""Streaming: equal to upstream's chunk by chunk, and to our own encoding of the whole recording in chunks."""

import pytest
import torch
import upstream
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import build_pair
from tolerances import PARITY, assert_parity

from zipformer_kernels.modules import Conv2dSubsampling
from zipformer_kernels.modules.encoder import Zipformer
from zipformer_kernels.modules.streaming import join_cache


@st.composite
def streams(draw):
    """Arguments of a causal encoder with one chunk size, and how many chunks to feed it."""
    stacks = draw(st.integers(1, 3))

    def each(*choices):
        return tuple(draw(st.sampled_from(choices)) for _ in range(stacks))

    chunk = draw(st.sampled_from([4, 8, 16]))
    config = {
        "downsampling_factor": each(1, 2, 4),
        "encoder_dim": each(8, 12, 16),
        "encoder_unmasked_dim": 8,
        "num_encoder_layers": each(1, 2),
        "num_heads": each(1, 2, 4),
        "feedforward_dim": 12,
        "cnn_module_kernel": each(3, 7),  # with 1, upstream caches a whole chunk of no context
        "query_head_dim": 4,
        "pos_head_dim": 2,
        "value_head_dim": 3,
        "pos_dim": 8,
        "causal": True,
        "chunk_size": (chunk,),
        "left_context_frames": (chunk * draw(st.integers(-(-12 // chunk), 5)),),
    }
    return config, draw(st.integers(1, 4))


def feed(model, x, x_lens):
    """The encoder's outputs for x, chunk by chunk, with the states after each."""
    (chunk,), left = model.chunk_size, model.left_context_frames[0]
    batch = x.shape[1]
    states = [state.to(x.dtype) for state in model.get_init_states(batch)]
    for start in range(0, len(x), chunk):
        before = torch.arange(start - left, start) < 0  # context from before the recording
        inside = torch.arange(start, start + chunk) >= x_lens[:, None]
        padding = torch.cat([before.expand(batch, left), inside], dim=1)
        y, lengths, states = model.streaming_forward(
            x[start : start + chunk], (x_lens - start).clamp(0, chunk), states, padding
        )
        yield y, lengths, states


@settings(max_examples=12)
@given(streams())
@torch.no_grad()
def test_encoder(stream):
    config, chunks = stream
    ours, theirs = build_pair(Zipformer, upstream.zipformer.Zipformer, **config)
    frames = chunks * config["chunk_size"][0]
    x = torch.randn(frames, 2, config["encoder_dim"][0], dtype=torch.float64)
    x_lens = torch.tensor([frames, frames])
    tolerance = PARITY[torch.float64]

    outputs = []
    steps = zip(feed(ours.eval(), x, x_lens), feed(theirs.eval(), x, x_lens), strict=True)
    for i, ((y, lengths, states), (their_y, their_lengths, their_states)) in enumerate(steps):
        assert_parity(y, their_y, tolerance, f"chunk {i}")
        assert torch.equal(lengths, their_lengths)
        for j, (state, their_state) in enumerate(zip(states, their_states, strict=True)):
            assert_parity(state, their_state, tolerance, f"state {j} after chunk {i}")
        outputs.append(y)

    whole, whole_lens = ours(x, x_lens)
    assert_parity(torch.cat(outputs), whole, tolerance, "all chunks")
    assert torch.equal(whole_lens, (x_lens + 1) // 2)


@torch.no_grad()
def test_padding_inside_a_chunk():
    """A short recording in a batch is not touched by what follows it."""
    config = {
        "encoder_dim": (8, 12),
        "downsampling_factor": (1, 2),
        "encoder_unmasked_dim": 8,
        "num_encoder_layers": 1,
        "num_heads": 2,
        "feedforward_dim": 12,
        "cnn_module_kernel": 3,
        "query_head_dim": 4,
        "pos_dim": 8,
        "causal": True,
        "chunk_size": (8,),
        "left_context_frames": (16,),
    }
    ours, theirs = build_pair(Zipformer, upstream.zipformer.Zipformer, **config)
    x = torch.randn(16, 2, 8, dtype=torch.float64)
    x_lens = torch.tensor([16, 10])
    for (y, *_), (their_y, *_) in zip(feed(ours.eval(), x, x_lens), feed(theirs.eval(), x, x_lens), strict=True):
        assert_parity(y, their_y, PARITY[torch.float64], "chunk")
    other = x.clone()
    other[10:, 1] += 1.0
    changed = torch.cat([y for y, *_ in feed(ours, other, x_lens)])
    same = torch.cat([y for y, *_ in feed(ours, x, x_lens)])
    assert_parity(changed[:5], same[:5], 1e-12, "the frames before the padding")
    assert not torch.equal(changed[5:], same[5:])


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_conv_embed(batch):
    ours, theirs = build_pair(Conv2dSubsampling, upstream.subsampling.Conv2dSubsampling, 20, 12, 4, 8, 8)
    ours.eval(), theirs.eval()
    pad, chunk = 3, 8  # frames of context inside the ConvNeXt block, and output frames per chunk
    frames_in = 2 * (chunk + pad) + 7
    x = torch.randn(batch, 2 * chunk * 4 + frames_in, 20, dtype=torch.float64)
    cache, their_cache = ours.get_init_states(batch), theirs.get_init_states(batch).double()
    assert_parity(cache, their_cache, 0.0, "first cache")
    outputs = []
    for start in range(0, x.shape[1] - frames_in + 1, 2 * chunk):
        piece = x[:, start : start + frames_in]
        x_lens = torch.full((batch,), frames_in)
        y, lengths, cache = ours.streaming_forward(piece, x_lens, cache)
        their_y, their_lengths, their_cache = theirs.streaming_forward(piece, x_lens, their_cache)
        assert_parity(y, their_y, PARITY[torch.float64], "chunk")
        assert_parity(cache, their_cache, PARITY[torch.float64], "cache")
        assert torch.equal(lengths, their_lengths)
        outputs.append(y)
    whole, _ = ours(x, torch.full((batch,), x.shape[1]))
    streamed = torch.cat(outputs, dim=1)
    assert streamed.shape[1] == 5 * chunk
    assert_parity(streamed, whole[:, : streamed.shape[1]], PARITY[torch.float64], "all chunks")


@torch.no_grad()
def test_preset_streams_with_upstreams_states():
    """The states of the smallest published model, in its parameters' dtype, and no mask at all."""
    model = Zipformer.from_preset("S", causal=True, chunk_size=(16,), left_context_frames=(64,)).half()
    states = model.get_init_states(2)
    theirs = upstream.zipformer.Zipformer.get_init_states(model, 2)
    assert [state.shape for state in states] == [state.shape for state in theirs]
    assert {state.dtype for state in states} == {torch.float16}


@torch.no_grad()
def test_no_mask():
    config = {"encoder_dim": 8, "encoder_unmasked_dim": 8, "num_encoder_layers": 1, "cnn_module_kernel": 3}
    model = Zipformer(**config, feedforward_dim=8, causal=True, chunk_size=(8,), left_context_frames=(8,)).eval()
    x, x_lens = torch.randn(8, 1, 8), torch.tensor([8])
    states = model.get_init_states(1)
    y, *_ = model.streaming_forward(x, x_lens, states, None)
    nothing_masked = torch.zeros(1, 16, dtype=torch.bool)
    assert torch.equal(y, model.streaming_forward(x, x_lens, states, nothing_masked)[0])
    with pytest.raises(ValueError, match="states: wanted 12 tensors, 6 for each layer, got 5"):
        model.streaming_forward(x, x_lens, states[:5], None)
    with pytest.raises(ValueError, match=r"cached_key: wanted 4 frames along dimension 0, got \(3, 1, "):
        model.streaming_forward(x, x_lens, [state[:3] for state in states], None)


def test_caches():
    x = torch.arange(5.0)[:, None]
    joined, cache = join_cache("cache", -x[:2], x, 2, dim=0)
    assert joined[:, 0].tolist() == [0.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert cache[:, 0].tolist() == [3.0, 4.0]
    assert join_cache("cache", x[:0], x, 0, dim=0)[1].shape == (0, 1)


def test_unlimited_context_cannot_stream():
    model = Zipformer(encoder_dim=8, encoder_unmasked_dim=8, num_encoder_layers=1, feedforward_dim=8, causal=True)
    with pytest.raises(ValueError, match="left_context_frames: streaming needs the first limited"):
        model.get_init_states()


def small_stream(batch):
    """A causal encoder of three layers, and the arguments of its first chunk."""
    model = Zipformer(
        downsampling_factor=(1, 2),
        encoder_dim=(8, 12),
        encoder_unmasked_dim=8,
        num_encoder_layers=(1, 2),
        num_heads=2,
        feedforward_dim=12,
        cnn_module_kernel=5,
        query_head_dim=4,
        pos_head_dim=2,
        value_head_dim=3,
        pos_dim=8,
        causal=True,
        chunk_size=(8,),
        left_context_frames=(16,),
    ).eval()
    padding = torch.zeros(batch, 16 + 8, dtype=torch.bool)
    return model, [torch.randn(8, batch, 8), torch.full((batch,), 8), model.get_init_states(batch), padding]


@pytest.mark.parametrize("gradients", [False, True])
def test_no_streams(gradients):
    """A batch of none: empty embeddings, and states of the same shapes."""
    model, args = small_stream(batch=0)
    with torch.set_grad_enabled(gradients):
        y, lengths, states = model.streaming_forward(*args)
    assert y.shape == (4, 0, 12)
    assert lengths.shape == (0,)
    assert [state.shape for state in states] == [state.shape for state in args[2]]


def test_what_does_not_fit_is_named():
    model, (x, lengths, states, padding) = small_stream(batch=1)
    for wrong in (states[:-1], [*states, states[0]], []):
        with pytest.raises(ValueError, match=f"states: wanted 18 tensors, 6 for each layer, got {len(wrong)}"):
            model.streaming_forward(x, lengths, wrong, padding)
    for wrong in (padding[:, 1:], padding.repeat(2, 1), padding[0]):
        with pytest.raises(ValueError, match=r"src_key_padding_mask: wanted shape \(1, 24\), got"):
            model.streaming_forward(x, lengths, states, wrong)
