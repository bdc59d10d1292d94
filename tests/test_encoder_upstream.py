"""The whole encoder against upstream's, in small random shapes: eval, and training steps under seeds."""

import random

import pytest
import torch
import upstream
from draws import seed_all, set_batch_count
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parity import assert_same_run, build_pair
from tolerances import PARITY, assert_parity, rounding

from zipformer_kernels.modules import Conv2dSubsampling
from zipformer_kernels.modules.encoder import Zipformer, Zipformer2

CHUNKS = {"chunk_size": (8, 16, -1), "left_context_frames": (32, 64, -1)}


@st.composite
def configurations(draw):
    stacks = draw(st.integers(1, 3))

    def each(*choices):
        return tuple(draw(st.sampled_from(choices)) for _ in range(stacks))

    causal = draw(st.booleans())
    dims = each(8, 12, 16, 20)
    return dict(
        downsampling_factor=each(1, 2, 4),
        encoder_dim=dims,
        encoder_unmasked_dim=tuple(draw(st.integers(4, dim)) for dim in dims),
        num_encoder_layers=each(1, 2),
        num_heads=each(1, 2, 4),
        feedforward_dim=each(8, 20),
        cnn_module_kernel=each(1, 3, 7),
        query_head_dim=draw(st.sampled_from([(4,), 6])),
        pos_head_dim=2,
        value_head_dim=3,
        pos_dim=8,
        causal=causal,
        **(CHUNKS if causal else {}),
    )


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=3)


def pair(config, dtype=torch.float64):
    return build_pair(Zipformer, upstream.zipformer.Zipformer, dtype=dtype, **config)


def batch(config, lengths, dtype=torch.float64):
    x_lens = torch.tensor(lengths)
    frames = max(lengths)
    x = torch.randn(frames, len(lengths), config["encoder_dim"][0], dtype=dtype)
    return [x, x_lens, torch.arange(frames) >= x_lens[:, None]]


def assume_gradients_are_determined(config, lengths):
    """Not zero but for rounding errors: Whiten's direction of two frames in all, which it scales up, and the gradient
    of a downsampling's weights where it repeats a single frame."""
    assume(max(lengths) > 1)
    assume(all(len(lengths) * -(-max(lengths) // factor) != 2 for factor in config["downsampling_factor"]))


@given(configurations(), lengths, st.booleans())
def test_eval(config, lengths, masked):
    assume_gradients_are_determined(config, lengths)
    ours, theirs = pair(config)
    args = batch(config, lengths)
    assert_same_run(ours.eval(), theirs.eval(), args if masked else args[:2])


@settings(max_examples=8)
@given(configurations(), st.integers(1, 3))
def test_single_frames(config, batch_size):
    ours, theirs = pair(config)
    with torch.no_grad():
        assert_same_run(ours.eval(), theirs.eval(), batch(config, [1] * batch_size))


@settings(max_examples=8)
@given(configurations(), lengths)
def test_eval_float32(config, lengths):
    """Gradients gather rounding errors over layers and, in sums that cancel, over frames: ten times more."""
    assume_gradients_are_determined(config, lengths)
    ours, theirs = pair(config, torch.float32)
    args = batch(config, lengths, torch.float32)
    with torch.no_grad():
        assert_same_run(ours.eval(), theirs.eval(), args)
    assert_same_run(ours, theirs, args, tolerance=10 * PARITY[torch.float32])


@settings(max_examples=12)
@given(configurations(), lengths.filter(lambda lengths: max(lengths) > 3), st.sampled_from([0, 100, 5000, 30000]))
def test_training(config, lengths, batch_count):
    """Three steps, each under its seed, with every skip, dropout, penalty, balancer and whitening."""
    assume_gradients_are_determined(config, lengths)
    ours, theirs = pair(config)
    args = batch(config, lengths)
    for step in range(3):
        for model in (ours.train(), theirs.train()):
            set_batch_count(model, batch_count + step)
        assert_same_run(ours, theirs, args, seed=step)


CONFIG = {
    "downsampling_factor": (1, 2),
    "encoder_dim": (16, 24),
    "encoder_unmasked_dim": (12, 16),
    "num_encoder_layers": (2, 2),
    "num_heads": (4, 4),
    "feedforward_dim": (24, 32),
    "cnn_module_kernel": (7, 5),
    "query_head_dim": 4,
    "pos_head_dim": 2,
    "value_head_dim": 3,
    "pos_dim": 8,
}


@pytest.mark.parametrize("batch_count", [0, 100, 5000, 30000])
def test_training_continues_as_upstream(batch_count):
    """Ten steps of descent without reseeding: each starts from the weights and generators left to it."""
    models = pair(CONFIG | {"causal": True} | CHUNKS)
    args = batch(CONFIG, [30, 21])
    runs = []
    for model in models:
        with upstream.wide():
            random.seed(3)
            torch.manual_seed(3)
            optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
            for step in range(10):
                set_batch_count(model, batch_count + step)
                optimizer.zero_grad()
                model(*args)[0].square().sum().backward()
                optimizer.step()
        runs.append((random.getstate(), torch.get_rng_state()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10), name


def test_training_differs_from_eval():
    """The comparisons in training have something to compare."""
    model = Zipformer(**CONFIG)
    args = batch(CONFIG, [30, 21], torch.float32)
    assert not torch.equal(model.train()(*args)[0], model(*args)[0])
    assert torch.equal(model.eval()(*args)[0], model(*args)[0])


def test_feature_masks():
    """For a batch so large that their rates show."""
    ours, theirs = pair(CONFIG)
    x = torch.zeros(1, 2000, 16, dtype=torch.float64)
    seed_all(0)
    expected = theirs.train().get_feature_masks(x)
    seed_all(0)
    for mask, their_mask in zip(ours.train().get_feature_masks(x), expected, strict=True):
        assert torch.equal(mask, their_mask)


@pytest.mark.parametrize("causal", [False, True])
def test_every_rate_and_limit(causal):
    """Attribute by attribute, for a probability that is a little off may not show in a few draws."""

    def settings_of(model):
        found = {}
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if key == "schedule":
                    found[name, key] = value.pairs
                elif isinstance(value, int | float | str | tuple) and not key.startswith("_"):
                    found[name, key] = value
        return found

    config = CONFIG | {"causal": causal} | CHUNKS
    ours = settings_of(torch.nn.ModuleList([Zipformer(**config), Conv2dSubsampling(20, 16)]))
    upstreams = upstream.zipformer.Zipformer(**config), upstream.subsampling.Conv2dSubsampling(20, 16)
    theirs = settings_of(torch.nn.ModuleList(upstreams))
    assert len(theirs) > 1000
    assert {key: ours.get(key) for key in theirs} == theirs


def test_autocast_keeps_upstreams_dtypes():
    """Of every module's result. (Upstream cannot train under autocast on a CPU, so this is eval only.)"""
    args = batch(CONFIG, [30, 21], torch.float32)
    outputs, dtypes = [], []
    for model in pair(CONFIG, torch.float32):
        seen = {}

        def note(module, _, out, seen=seen):
            seen[module.full_name] = getattr(out, "dtype", None)

        for name, module in model.eval().named_modules():
            module.full_name = name
            module.register_forward_hook(note)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(*args)[0])
        dtypes.append(seen)
    fused = ("conv_module1", "conv_module2"), ("sigmoid", "activation2", "depthwise_conv")
    absent = {name for name in dtypes[1] if name not in dtypes[0]}
    assert all(name.split(".")[-2] in fused[0] and name.split(".")[-1] in fused[1] for name in absent)
    assert dtypes[0] == {name: dtype for name, dtype in dtypes[1].items() if name not in absent}
    assert set(dtypes[0].values()) > {torch.float32, torch.bfloat16}
    assert_parity(*outputs, rounding(torch.bfloat16), "output")


def test_training_under_autocast():
    """Half precision changes the gradients by its rounding only."""
    model = Zipformer(**CONFIG).train()
    set_batch_count(model, 5000)
    args = batch(CONFIG, [30, 21], torch.float32)

    def gradients(enabled):
        random.seed(1)
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _ = model(*args)
        y.float().square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    full, half = gradients(False), gradients(True)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(full, half, dim=0) > 0.999


def test_names():
    assert Zipformer2 is Zipformer


def test_empty_batch():
    y, y_lens = Zipformer(**CONFIG).eval()(torch.zeros(10, 0, 16), torch.zeros(0, dtype=torch.long))
    assert y.shape == (5, 0, 24)
    assert y_lens.shape == (0,)


BAD = {
    "no frames": ({}, (torch.zeros(0, 2, 16), torch.tensor([0, 0])), "x: .* at least one frame"),
    "rank": ({}, (torch.zeros(9, 16), torch.tensor([9])), r"x: wanted \(frames, batch, channels\)"),
    "lengths": ({}, (torch.zeros(9, 2, 16), torch.tensor([9])), "x_lens: wanted one length for each of 2"),
    "mask": (
        {},
        (torch.zeros(9, 2, 16), torch.tensor([9, 9]), torch.zeros(9, 2).bool()),
        r"src_key_padding_mask: wanted shape \(2, 9\)",
    ),
    "training channels": (
        {},
        (torch.zeros(9, 2, 15), torch.tensor([9, 9])),
        "x: wanted 16 channels in training",
    ),
    "chunks": (
        {"causal": True, "chunk_size": (5,), "left_context_frames": (20,)},
        (torch.zeros(9, 2, 16), torch.tensor([9, 9])),
        "chunk_size: .* got 5",
    ),
    "context": (
        {"causal": True, "chunk_size": (2,), "left_context_frames": (2,)},
        (torch.zeros(9, 2, 16), torch.tensor([9, 9])),
        "left_context_frames: the convolutions need 4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    overrides, args, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Zipformer(**(CONFIG | overrides))(*args)


@pytest.mark.parametrize("lengths", [[9, 9], (9, 9), 9, None])
def test_lengths_that_are_no_tensor(lengths):
    message = f"x_lens: wanted a tensor of 2 lengths, got {type(lengths).__name__}"
    encoder = Zipformer(**CONFIG, causal=True, chunk_size=(4,), left_context_frames=(8,))
    with pytest.raises(TypeError, match=message):
        encoder(torch.zeros(9, 2, 16), lengths)
    with pytest.raises(TypeError, match=message):
        encoder.streaming_forward(torch.zeros(4, 2, 16), lengths, encoder.get_init_states(2), None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder_dim": (16, 24, 32)}, "encoder_dim: wanted one number or 2"),
        ({"encoder_unmasked_dim": (17, 16)}, "encoder_unmasked_dim: 17 exceeds"),
        ({"num_encoder_layers": 0}, "num_encoder_layers: wanted whole numbers of at least 1, got 0"),
        ({"num_encoder_layers": (1, 0)}, r"num_encoder_layers: wanted whole numbers of at least 1, got \(1, 0\)"),
        ({"num_heads": -2}, "num_heads: wanted whole numbers of at least 1, got -2"),
        ({"query_head_dim": 4.0}, r"query_head_dim: wanted whole numbers of at least 1, got 4\.0"),
        ({"encoder_dim": "16"}, "encoder_dim: wanted whole numbers of at least 1, got '16'"),
        ({"downsampling_factor": (1, 0)}, r"downsampling_factor: wanted whole numbers of at least 1, got \(1, 0\)"),
        ({"downsampling_factor": ()}, "downsampling_factor: wanted one number for each stack, got none"),
    ],
)
def test_bad_configuration(overrides, message):
    with pytest.raises(ValueError, match=message):
        Zipformer(**(CONFIG | overrides))
