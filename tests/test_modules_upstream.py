"""Every module alone against upstream's: initial weights, outputs, gradients and draws."""

import pytest
import torch
import upstream
from draws import set_batch_count
from parity import assert_same_run, build_pair
from tolerances import PARITY, assert_parity, relative_error

from zipformer_kernels import modules, training
from zipformer_kernels.modules.encoder import convert_num_channels
from zipformer_kernels.ops.attention import constant_attention

T, B, C = 13, 3, 16
HEADS, QUERY, POSITION, VALUE, POS_DIM = 4, 6, 3, 5, 10
LAYER = {
    "embed_dim": C,
    "pos_dim": POS_DIM,
    "num_heads": HEADS,
    "query_head_dim": QUERY,
    "pos_head_dim": POSITION,
    "value_head_dim": VALUE,
    "feedforward_dim": 24,
    "cnn_module_kernel": 7,
}


def normal(*shape):
    return lambda: (torch.randn(shape, dtype=torch.float64) * 2,)


def weights(heads):
    return torch.randn(heads, B, T, T, dtype=torch.float64).softmax(-1)


def with_positions():
    return (*normal(T, B, C)(), torch.randn(1, 2 * T - 1, POS_DIM, dtype=torch.float64))


def padding(frames=T):
    return torch.arange(frames) >= torch.tensor([[frames], [frames - 5], [1]])


def chunk_mask(size=4):
    chunk = torch.arange(T) // size
    return chunk[None, :] > chunk[:, None]


def stack_of(classes, downsample=None, causal=False):
    """A stack of two layers in `classes`, alone or downsampled."""

    def build():
        layer = classes.ZipformerEncoderLayer(**LAYER, causal=causal)
        stack = classes.ZipformerEncoder(layer, 2, pos_dim=POS_DIM, dropout=0.1, warmup_begin=100.0, warmup_end=900.0)
        if downsample is None:
            return stack
        return classes.DownsampledZipformerEncoder(stack, dim=C, downsample=downsample, dropout=0.1, causal=causal)

    return build


def ad_linear(**kwargs):
    return ("scaling", "ActivationDropoutAndLinear", (C, 11), kwargs)


ATTENTION = ("zipformer", "RelPositionMultiheadAttentionWeights", (C, POS_DIM, HEADS, QUERY, POSITION), {})
CONV = {causal: ("zipformer", "ConvolutionModule", (C, 7, causal), {}) for causal in (False, True)}
CHUNK_CONV = ("scaling", "ChunkCausalDepthwiseConv1d", (C, 7), {})
LAYERS = {c: ("zipformer", "ZipformerEncoderLayer", (), {**LAYER, "causal": c}) for c in (False, True)}

# Name: (where upstream has it, class, arguments, keyword arguments), inputs, keyword inputs.
CASES = {
    "SwooshL": (("scaling", "SwooshL", (), {}), normal(T, B, C), {}),
    "SwooshR": (("scaling", "SwooshR", (), {}), normal(T, B, C), {}),
    "ScaledLinear": (("scaling", "ScaledLinear", (C, 9), {"initial_scale": 0.3}), normal(T, B, C), {}),
    "ScaledConv2d": (("scaling", "ScaledConv2d", (2, 3, 3), {"initial_scale": 0.3}), normal(B, 2, T, C), {}),
    "BiasNorm": (("scaling", "BiasNorm", (C,), {}), normal(T, B, C), {}),
    "BiasNorm, channels second": (("scaling", "BiasNorm", (C,), {"channel_dim": 1}), normal(B, C, T, 2), {}),
    "BiasNorm, limited": (("scaling", "BiasNorm", (C,), {"log_scale_max": 0.5}), normal(T, B, C), {}),
    "SwooshL linear": (ad_linear(), normal(T, B, C), {}),
    "SwooshR linear": (ad_linear(activation="SwooshR", bias=False), normal(T, B, C), {}),
    "dropout linear, shared": (ad_linear(dropout_p=0.3, dropout_shared_dim=0), normal(T, B, C), {}),
    "dropout linear": (ad_linear(dropout_p=0.3, dropout_shared_dim=None), normal(T, B, C), {}),
    "Dropout2": (("scaling", "Dropout2", (0.4,), {}), normal(T, B, C), {}),
    "Dropout3": (("scaling", "Dropout3", (0.4,), {"shared_dim": 1}), normal(T, B, C), {}),
    "ScaleGrad": (("scaling", "ScaleGrad", (0.2,), {}), normal(T, B, C), {}),
    "positions": (("zipformer", "CompactRelPositionalEncoding", (POS_DIM, 0.15), {}), normal(T, B, C), {}),
    "positions, context": (
        ("zipformer", "CompactRelPositionalEncoding", (POS_DIM, 0.15), {"length_factor": 1.5}),
        normal(T, B, C),
        {"left_context_len": 9},
    ),
    "attention": (ATTENTION, with_positions, {}),
    "attention, masked": (
        ATTENTION,
        with_positions,
        {"key_padding_mask": padding(), "attn_mask": chunk_mask()},
    ),
    "attention, mask for each sequence": (
        ATTENTION,
        with_positions,
        {"attn_mask": chunk_mask().expand(B, T, T)},
    ),
    "attention, positions skipped": (
        (*ATTENTION[:3], {"pos_emb_skip_rate": 1.0, "dropout": 0.2}),
        with_positions,
        {},
    ),
    "SelfAttention": (
        ("zipformer", "SelfAttention", (C, HEADS, VALUE), {}),
        lambda: (*normal(T, B, C)(), weights(HEADS)),
        {},
    ),
    "NonlinAttention": (
        ("zipformer", "NonlinAttention", (C, 12), {}),
        lambda: (*normal(T, B, C)(), weights(1)),
        {},
    ),
    "feedforward": (("zipformer", "FeedforwardModule", (C, 24, 0.2), {}), normal(T, B, C), {}),
    "convolution": (CONV[False], normal(T, B, C), {"src_key_padding_mask": padding()}),
    "convolution, causal": (CONV[True], normal(T, B, C), {"src_key_padding_mask": padding()}),
    "convolution, chunks": (CONV[True], normal(T, B, C), {"chunk_size": 4}),
    "chunk conv, whole": (CHUNK_CONV, normal(B, C, T), {}),
    "chunk conv, short chunks": (CHUNK_CONV, normal(B, C, T), {"chunk_size": 3}),
    "chunk conv, long chunks": (CHUNK_CONV, normal(B, C, 2 * T), {"chunk_size": 9}),
    "chunk conv, one chunk": (CHUNK_CONV, normal(B, C, T), {"chunk_size": 40}),
    "chunk conv, scaled": (
        (*CHUNK_CONV[:3], {"initial_scale": 0.2, "bias": False}),
        normal(B, C, T),
        {"chunk_size": 5},
    ),
    "bypass": (
        ("zipformer", "BypassModule", (C,), {"skip_rate": 0.4, "straight_through_rate": 0.3}),
        lambda: (*normal(T, B, C)(), *normal(T, B, C)()),
        {},
    ),
    "downsample": (("zipformer", "SimpleDownsample", (C, 4, 0.1, False), {}), normal(T, B, C), {}),
    "downsample, exact": (("zipformer", "SimpleDownsample", (C, 2, 0.1, True), {}), normal(12, B, C), {}),
    "upsample": (("zipformer", "SimpleUpsample", (C, 4), {}), normal(T, B, C), {}),
    "layer": (LAYERS[False], with_positions, {"src_key_padding_mask": padding()}),
    "layer, causal": (
        LAYERS[True],
        with_positions,
        {"chunk_size": 4, "attn_mask": chunk_mask(), "src_key_padding_mask": padding()},
    ),
    "ConvNeXt": (("subsampling", "ConvNeXt", (6,), {"kernel_size": (7, 5)}), normal(B, 6, T, 9), {}),
}


def our(name):
    return getattr(modules, name, None) or getattr(training, name)


def pair(case, dtype):
    (where, name, args, kwargs), inputs, call = CASES[case]
    ours, theirs = build_pair(our(name), getattr(getattr(upstream, where), name), *args, dtype=dtype, **kwargs)
    torch.manual_seed(5)
    return ours, theirs, [x.to(dtype) for x in inputs()], call


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_eval(case, dtype):
    ours, theirs, args, call = pair(case, dtype)
    assert_same_run(ours.eval(), theirs.eval(), args, call)


@pytest.mark.parametrize("batch_count", [None, 0, 5000])
@pytest.mark.parametrize("case", CASES)
def test_training(case, batch_count):
    ours, theirs, args, call = pair(case, torch.float64)
    for model in (ours, theirs):
        model.train()
        set_batch_count(model, batch_count)
    for seed in range(6):  # enough for every penalty, skip and balancer to have acted
        assert_same_run(ours, theirs, args, call, seed=seed)


@pytest.mark.parametrize("case", ["layer", "layer, causal", "convolution", "attention, masked", "ConvNeXt"])
def test_training_float32(case):
    """Upstream as it is, with float32 in Balancer and Whiten: cancelling sums cost it some digits."""
    ours, theirs, args, call = pair(case, torch.float32)
    for seed in range(6):
        assert_same_run(ours.train(), theirs.train(), args, call, seed=seed, tolerance=10 * PARITY[torch.float32])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("downsample", [None, 2, 4])
def test_stacks(downsample, mode):
    built = [stack_of(classes, downsample) for classes in (modules, upstream.zipformer)]
    ours, theirs = build_pair(*built)
    torch.manual_seed(5)
    x = torch.randn(T, B, C, dtype=torch.float64)
    feature_mask = (torch.rand(1, B, C) > 0.3).double()
    call = {"src_key_padding_mask": padding()[:, :: downsample or 1], "feature_mask": feature_mask}
    for model in (ours, theirs):
        model.train(mode == "train")
        set_batch_count(model, 300)
    for seed in range(3):
        assert_same_run(ours, theirs, [x], call, seed=seed)


@pytest.mark.parametrize("channels", [C - 3, C, C + 5])
def test_convert_num_channels(channels):
    (x,) = normal(T, B, C)()
    assert torch.equal(convert_num_channels(x, channels), upstream.zipformer.convert_num_channels(x, channels))


def test_constant_attention_is_a_masked_mean():
    scores = torch.randn(1, B, T, T).masked_fill(chunk_mask(), -1000)
    seen = (~chunk_mask()).float()
    expected = (seen / seen.sum(-1, keepdim=True)).expand(1, B, T, T)
    assert_parity(constant_attention(scores.softmax(-1)), expected.contiguous(), 1e-6, "weights")


def test_position_table_grows():
    ours, theirs = (c.CompactRelPositionalEncoding(POS_DIM, 0.0, 5) for c in (modules, upstream.zipformer))
    for frames in (4, T, 2):
        x = torch.zeros(frames, B, C)
        assert torch.equal(ours(x), theirs(x))


def test_position_table_keeps_float32():
    """Upstream rounds its table for good when it meets half precision, and returns float32 when it grows."""
    encoding = modules.CompactRelPositionalEncoding(POS_DIM, 0.0).eval()
    before = encoding(torch.zeros(T, 1, 1))
    assert encoding(torch.zeros(T, 1, 1, dtype=torch.float16)).dtype == torch.float16
    assert torch.equal(encoding(torch.zeros(T, 1, 1)), before)


def test_the_comparison_can_fail():
    """A change in the sixth digit of one weight, or one draw too many, is noticed."""
    ours, theirs, args, call = pair("layer", torch.float64)
    ours.eval().norm.bias.data[0] += 1e-6
    with pytest.raises(AssertionError, match="off by"):
        assert_same_run(ours, theirs.eval(), args, call)

    ours, theirs, args, call = pair("ScaleGrad", torch.float64)
    ours.register_forward_hook(lambda *_: torch.rand(1) and None)
    with pytest.raises(AssertionError, match="torch's generator"):
        assert_same_run(ours, theirs, args, call)
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


BAD = {
    "BiasNorm": (lambda: modules.BiasNorm(C)(torch.zeros(T, B, C + 1)), "x: wanted 16 channels"),
    "activation": (
        lambda: modules.ActivationDropoutAndLinear(C, C, activation="ReLU"),
        "activation: .*'ReLU'",
    ),
    "kernel": (lambda: modules.ConvolutionModule(C, 8, causal=False), "kernel_size must be odd, got 8"),
    "chunks": (
        lambda: modules.ConvolutionModule(C, 7, causal=False)(torch.zeros(T, B, C), chunk_size=4),
        "chunk_size: 4 needs",
    ),
    "padding": (
        lambda: modules.ConvolutionModule(C, 7, causal=False)(torch.zeros(T, B, C), torch.zeros(B, T + 1).bool()),
        r"src_key_padding_mask: wanted shape \(3, 13\), got \(3, 14\)",
    ),
    "values": (
        lambda: modules.SelfAttention(C, HEADS, VALUE)(torch.zeros(T, B, C), torch.zeros(HEADS, B, T, T + 1)),
        r"values must be \(sources, batch, heads \* channels\)",
    ),
    "positions": (
        lambda: modules.RelPositionMultiheadAttentionWeights(C, POS_DIM, HEADS, QUERY, POSITION)(
            torch.zeros(T, B, C), torch.zeros(1, 2 * T, POS_DIM)
        ),
        "pos_emb: wanted 25 offsets",
    ),
    "mask": (
        lambda: modules.RelPositionMultiheadAttentionWeights(C, POS_DIM, HEADS, QUERY, POSITION)(
            torch.zeros(T, B, C), torch.zeros(1, 2 * T - 1, POS_DIM), attn_mask=torch.zeros(T, T)
        ),
        "attn_mask must be of dtype bool",
    ),
    "odd encoding": (lambda: modules.CompactRelPositionalEncoding(9, 0.1), "embed_dim must be even, got 9"),
    "length factor": (
        lambda: modules.CompactRelPositionalEncoding(8, 0.1, length_factor=0.5),
        "length_factor",
    ),
    "warm-up": (
        lambda: modules.ZipformerEncoder(torch.nn.Identity(), 1, POS_DIM, 0.1, 10.0, 5.0),
        "warmup_begin <= warmup_end",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
