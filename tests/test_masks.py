"""Padding masks of integers, as icefall's export and decoding scripts pass them: taken as upstream takes them.

There every padding mask is cast to bools where it is used, and a mask of pairs of frames must be of bools.
"""

import pytest
import torch
import upstream
from draws import seed_all
from parity import assert_same_run, build_pair
from test_encoder_upstream import CONFIG
from tolerances import PARITY, assert_parity
from torch import nn

from zipformer_kernels import Zipformer, modules
from zipformer_kernels.ops import conv_module
from zipformer_kernels.ops.attention import AttentionWeights
from zipformer_kernels.ops.conv_module.stream import stream_conv_module
from zipformer_kernels.ops.shapes import as_mask

INTEGERS = (torch.int32, torch.int64, torch.uint8, torch.int8)
CHUNKS = {"causal": True, "chunk_size": (8,), "left_context_frames": (32,)}
KERNEL = 5


class Cast(nn.Module):
    """Upstream's module, its padding mask cast to bools as icefall's files do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        *args, mask = args
        return self.module(*args, mask.bool())

    def streaming_forward(self, *args):
        *args, mask = args
        return self.module.streaming_forward(*args, mask.bool())

    def named_parameters(self, *args, **kwargs):
        return self.module.named_parameters(*args, **kwargs)


def padding(frames, lengths, dtype):
    """1 on padding, or in the last sequence -3, as a dtype has that."""
    mask = (torch.arange(frames) >= torch.tensor(lengths)[:, None]).long()
    mask[-1] *= -3
    return mask.to(dtype)


@pytest.mark.parametrize("chunks", [{}, CHUNKS], ids=["offline", "chunks"])
@pytest.mark.parametrize("dtype", INTEGERS[:3:2])
def test_encoder(dtype, chunks):
    ours, theirs = build_pair(Zipformer, upstream.zipformer.Zipformer, **CONFIG, **chunks)
    x = torch.randn(21, 2, CONFIG["encoder_dim"][0], dtype=torch.float64)
    args = [x, torch.tensor([21, 13]), padding(21, [21, 13], dtype)]
    assert_same_run(ours.eval(), Cast(theirs.eval()), args)
    with torch.no_grad():
        assert_same_run(ours, Cast(theirs), args)
    assert_same_run(ours.train(), Cast(theirs.train()), args)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", INTEGERS[:3:2])
def test_stream(dtype, batch):
    ours, theirs = build_pair(Zipformer, upstream.zipformer.Zipformer, dtype=torch.float32, **CONFIG, **CHUNKS)
    x, lengths = torch.randn(8, batch, CONFIG["encoder_dim"][0]), torch.full((batch,), 8)
    mask = torch.cat([torch.ones(batch, 32), padding(8, [8, 5][:batch], torch.float32)], dim=1).to(dtype)
    states = ours.get_init_states(batch)
    with torch.no_grad():
        expected = Cast(theirs.eval()).streaming_forward(x, lengths, states, mask)
        actual = ours.eval().streaming_forward(x, lengths, states, mask)
    assert_parity(actual[0], expected[0], PARITY[torch.float32], "embeddings")
    for i, (ours_next, theirs_next) in enumerate(zip(actual[2], expected[2], strict=True)):
        assert_parity(ours_next, theirs_next, PARITY[torch.float32], f"state {i}")


def module_calls():
    """Modules that take a padding mask, and functions from x, (7, 2, 8), and the mask to their result."""
    pos_emb = torch.randn(1, 13, 6)
    attention = modules.RelPositionMultiheadAttentionWeights(8, 6, 2, 4, 2).eval()
    conv, chunked = (modules.ConvolutionModule(8, KERNEL, causal).eval() for causal in (False, True))
    watched = modules.ConvolutionModule(8, KERNEL, causal=False).eval()
    watched.sigmoid.register_forward_hook(lambda *_: None)
    layer = modules.ZipformerEncoderLayer(8, 6, 2, 4, 2, 2, 12, cnn_module_kernel=KERNEL).eval()
    stack = modules.ZipformerEncoder(layer, 2, pos_dim=6, dropout=0.0, warmup_begin=0.0, warmup_end=1.0).eval()
    left = torch.randn(2, 8, KERNEL // 2)
    return {
        "attention weights": lambda x, mask: attention(x, pos_emb, mask),
        "convolution": conv,
        "chunked convolution": lambda x, mask: chunked(x, mask, 4),
        "watched convolution": watched,
        "convolution of a stream": lambda x, mask: chunked.streaming_forward(x, left, mask)[0],
        "layer": lambda x, mask: layer(x, pos_emb, src_key_padding_mask=mask),
        "stack": lambda x, mask: stack(x, src_key_padding_mask=mask),
    }


def op_calls():
    """Ops that take a padding mask, likewise."""
    weight, causal, edges = torch.randn(8, 1, KERNEL), torch.randn(8, 1, KERNEL // 2 + 1), torch.randn(2, 8, KERNEL)
    bias, left, square = torch.randn(8), torch.randn(2, 8, KERNEL // 2), torch.randn(8, 8)
    parts = weight, bias, causal, bias, edges
    infer = conv_module.infer_conv_module

    def weights(x, mask):
        return AttentionWeights(x, x, key_padding_mask=mask)

    return {
        "AttentionWeights": lambda x, mask: weights(x.unflatten(2, (2, 4)), mask).materialize(),
        "conv_module": lambda x, mask: conv_module.conv_module(x, x, weight, bias, mask),
        "chunk_conv_module": lambda x, mask: conv_module.chunk_conv_module(x, x, *parts, 4, mask),
        "infer_conv_module": lambda x, mask: infer(x.repeat(1, 1, 2), None, weight, bias, key_padding_mask=mask)[0],
        "stream_conv_module": lambda x, mask: stream_conv_module(
            x, square.repeat(2, 1), None, left, *parts, mask, square, bias
        )[0],
    }


CALLS = ["attention weights", "convolution", "chunked convolution", "watched convolution", "convolution of a stream"]
CALLS += ["layer", "stack", "AttentionWeights", "conv_module", "chunk_conv_module", "infer_conv_module"]
CALLS += ["stream_conv_module"]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_integers_mean_what_bools_mean(name, gradients):
    seed_all(0)
    call = (module_calls() | op_calls())[name]
    x = torch.randn(7, 2, 8)
    with torch.set_grad_enabled(gradients):
        expected = call(x, padding(7, [7, 4], torch.bool))
        assert not torch.equal(expected, call(x, torch.zeros(2, 7, dtype=torch.bool)))
        for dtype in INTEGERS:
            assert torch.equal(call(x, padding(7, [7, 4], dtype)), expected), dtype


@pytest.mark.parametrize("name", CALLS)
def test_floats_are_refused(name):
    call = (module_calls() | op_calls())[name]
    for wrong in (torch.zeros(2, 7), torch.zeros(2, 7, dtype=torch.float16)):
        with pytest.raises(TypeError, match=rf"key_padding_mask must be .* bools or integers, got {wrong.dtype}"):
            call(torch.randn(7, 2, 8), wrong)


def test_encoder_refuses_floats():
    encoder = Zipformer(**CONFIG, **CHUNKS).eval()
    x, lengths = torch.randn(8, 1, CONFIG["encoder_dim"][0]), torch.tensor([8])
    message = r"src_key_padding_mask must be a tensor of bools or integers, got torch\.float32"
    with pytest.raises(TypeError, match=message):
        encoder(x, lengths, torch.zeros(1, 8))
    with pytest.raises(TypeError, match=message):
        encoder.streaming_forward(x, lengths, encoder.get_init_states(), torch.zeros(1, 40))


def test_attention_masks_are_of_bools():
    """Upstream asserts it."""
    attention = modules.RelPositionMultiheadAttentionWeights(8, 6, 2, 4, 2).eval()
    with pytest.raises(TypeError, match=r"attn_mask must be of dtype bool, got torch\.int32"):
        attention(torch.randn(7, 2, 8), torch.randn(1, 13, 6), attn_mask=torch.zeros(7, 7, dtype=torch.int32))


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="mask must be a tensor of bools or integers, got list"):
        as_mask("mask", [[True]])
