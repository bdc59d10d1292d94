"""Models whose weights are bfloat16, for inference without autocast: they run, and how far from float32 they are.

Under autocast what passes between layers stays float32; here each addition of a layer rounds it, by up to 2^-9 of its
size. With weights at random outputs come to 6.4e-3 to 6.9e-3 off in root mean square, and under autocast to 6e-4 to
7e-4; a conv embed to 3.1e-3 and 2.6e-3.
"""

import pytest
import torch

from zipformer_kernels import Conv2dSubsampling, Zipformer

SIZES = {
    "encoder_dim": (32, 48),
    "encoder_unmasked_dim": (24, 32),
    "num_encoder_layers": (1, 2),
    "feedforward_dim": 64,
    "num_heads": 2,
}
CHUNK, LEFT = 8, 64
CAUSAL = {"causal": True, "chunk_size": (CHUNK,), "left_context_frames": (LEFT,)}
FRAMES = 64
ENCODER_OFF, EMBED_OFF, AUTOCAST_OFF = 1.2e-2, 6e-3, 1.5e-3


def off(actual, wanted):
    """The root mean square of the difference, relative to that of what is wanted."""
    actual, wanted = actual.double(), wanted.double()
    return ((actual - wanted).norm() / wanted.norm()).item()


def encoder(**options):
    torch.manual_seed(0)
    model = Zipformer(**SIZES, **options).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def batch():
    lengths = torch.tensor([FRAMES, 50, 33])
    return torch.randn(FRAMES, 3, 32), lengths, torch.arange(FRAMES) >= lengths[:, None]


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["whole recordings", "in chunks"])
@torch.inference_mode()
def test_an_encoder(options):
    model, (x, lengths, padding) = encoder(**options), batch()
    wanted, _ = model(x, lengths, padding)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = model(x, lengths, padding)
    y, out_lengths = model.bfloat16()(x.bfloat16(), lengths, padding)
    assert y.dtype == torch.bfloat16
    assert out_lengths.tolist() == [32, 25, 17]
    assert off(y, wanted) <= ENCODER_OFF
    assert off(cast, wanted) <= AUTOCAST_OFF


@torch.inference_mode()
def test_a_stream():
    model, (x, _, _) = encoder(**CAUSAL), batch()
    wanted, y = streamed(model, x), streamed(model.bfloat16(), x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert off(y, wanted) <= ENCODER_OFF


def streamed(model, x):
    """The encoder's output of x, chunk by chunk; states keep the dtype of x."""
    states = [state.to(x.dtype) for state in model.get_init_states(x.shape[1])]
    found = []
    for start in range(0, len(x), CHUNK):
        before = torch.arange(start - LEFT, start) < 0
        padding = torch.cat([before, torch.zeros(CHUNK, dtype=torch.bool)]).expand(x.shape[1], -1)
        lengths = torch.full((x.shape[1],), CHUNK)
        y, _, states = model.streaming_forward(x[start : start + CHUNK], lengths, states, padding)
        assert {state.dtype for state in states} == {x.dtype}
        found.append(y)
    return torch.cat(found)


@torch.inference_mode()
def test_a_conv_embed():
    torch.manual_seed(0)
    model = Conv2dSubsampling.from_preset("S").eval()
    features, lengths = torch.randn(2, 200, 80), torch.tensor([200, 150])
    wanted, _ = model(features, lengths)
    y, _ = model.bfloat16()(features.bfloat16(), lengths)
    assert y.dtype == torch.bfloat16
    assert off(y, wanted) <= EMBED_OFF
