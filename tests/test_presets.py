"""The published sizes S, M, L and XL: parameters, FLOPs, initial weights, and one forward against upstream."""

import pytest
import torch
import upstream
from draws import seed_all
from parity import assert_same_weights
from tolerances import PARITY, assert_parity
from torch.utils.flop_counter import FlopCounterMode

from zipformer_kernels.modules import Conv2dSubsampling
from zipformer_kernels.modules.encoder import Zipformer
from zipformer_kernels.presets import PRESETS

# Parameters, and GFLOPs for 30 s of speech, of encoder and conv embed. Counted on upstream; the paper (table
# 1) has 40.8, 62.9 and 107.7 with decoder and joiner.
PARAMETERS = {"S": 21_989_779, "M": 63_994_103, "L": 146_625_594, "XL": 286_081_530}
GFLOPS = {"S": 40.65, "M": 62.75, "L": 107.50, "XL": 192.77}


def encode(embed, encoder, features):
    x_lens = torch.full((features.shape[0],), features.shape[1])
    x, x_lens = embed(features, x_lens)
    return encoder(x.transpose(0, 1), x_lens)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_and_flops(name):
    """On the meta device: shapes only, no arithmetic."""
    with torch.device("meta"):
        embed, encoder = Conv2dSubsampling.from_preset(name).eval(), Zipformer.from_preset(name).eval()
        features = torch.zeros(1, 3000, 80)
    assert sum(p.numel() for m in (embed, encoder) for p in m.parameters()) == PARAMETERS[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y, _ = encode(embed, encoder, features)
    assert y.shape == (748, 1, max(PRESETS[name]["encoder_dim"]))
    assert counter.get_total_flops() / 1e9 == pytest.approx(GFLOPS[name], rel=0.005)


@pytest.mark.parametrize("name", PRESETS)
def test_forward(name):
    """One seed gives upstream's weights, the same features its embeddings. One layer a stack will do."""
    arguments = PRESETS[name] | {"num_encoder_layers": 1}
    features = torch.randn(2, 150, 80, dtype=torch.float64)
    outputs = []
    models = []
    for Embed, Encoder in (
        (Conv2dSubsampling, Zipformer),
        (upstream.subsampling.Conv2dSubsampling, upstream.zipformer.Zipformer),
    ):
        seed_all(0)
        embed, encoder = Embed(80, arguments["encoder_dim"][0]).eval(), Encoder(**arguments).eval()
        with torch.no_grad():
            outputs.append(encode(embed.double(), encoder.double(), features))
        models.append((embed, encoder))
    for ours, theirs in zip(*models, strict=True):
        assert_same_weights(ours, theirs)
    assert_parity(outputs[0][0], outputs[1][0], PARITY[torch.float64], "embeddings")
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_causal_preset_has_the_recipes_chunks():
    model = Zipformer.from_preset("S", causal=True)
    assert model.chunk_size == (16, 32, 64, -1)
    assert model.left_context_frames == (64, 128, 256, -1)
    assert Zipformer.from_preset("S", causal=True, chunk_size=(32,)).chunk_size == (32,)


@pytest.mark.parametrize("cls", [Zipformer, Conv2dSubsampling])
def test_unknown_preset(cls):
    with pytest.raises(ValueError, match="preset: wanted one of S, M, L, XL, got 'XS'"):
        cls.from_preset("XS")
