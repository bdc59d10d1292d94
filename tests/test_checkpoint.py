"""Checkpoints in all the forms they come in: what is read off them, and what is refused."""

import pathlib

import pytest
import safetensors.torch
import torch
from tiny import tiny, weights_of

from zipformer_kernels.checkpoint import CheckpointError, load_checkpoint
from zipformer_kernels.encoder import Zipformer
from zipformer_kernels.modules.subsampling import Conv2dSubsampling
from zipformer_kernels.presets import PRESETS


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["icefall", "ddp", "plain", "safetensors", "half"])
def test_every_form_of_checkpoint_loads(tmp_path, form, causal):
    embed, encoder = tiny(causal, seed=3)
    weights = weights_of(embed, encoder, "module." if form == "ddp" else "")
    path = tmp_path / ("c.safetensors" if form == "safetensors" else "c.pt")
    if form == "safetensors":
        safetensors.torch.save_file(weights, path)
    elif form == "half":
        torch.save({key: value.half() for key, value in weights.items()}, path)
    elif form == "plain":
        torch.save(weights, path)
    else:
        extras = {"exp_dir": pathlib.Path("zipformer/exp"), "epoch": 30, "optimizer": {"state": [1.5, None]}}
        torch.save({"model": weights, "model_avg": None, **extras}, path)
    loaded = load_checkpoint(path)
    for ours, theirs in zip(loaded, (embed, encoder), strict=True):
        assert not ours.training
        wanted = theirs.half().float() if form == "half" else theirs
        assert ours.state_dict().keys() == wanted.state_dict().keys()
        for key, value in ours.state_dict().items():
            assert torch.equal(value, wanted.state_dict()[key]), key
    for name in (
        "downsampling_factor",
        "encoder_dim",
        "query_head_dim",
        "value_head_dim",
        "num_heads",
        "causal",
    ):
        assert getattr(loaded[1], name) == getattr(encoder, name), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised(tmp_path, name, causal):
    torch.manual_seed(0)
    encoder = Zipformer.from_preset(name, causal=causal)
    torch.save(weights_of(Conv2dSubsampling.from_preset(name), encoder), tmp_path / "c.pt")
    _, loaded = load_checkpoint(tmp_path / "c.pt", name, causal)
    assert loaded.encoder_unmasked_dim == PRESETS[name]["encoder_unmasked_dim"]
    assert loaded.chunk_size == encoder.chunk_size
    other = next(preset for preset in PRESETS if preset != name)
    wanted = rf"does not fit preset {other} \(it has the sizes of preset {name}\): .*encoder_dim is \("
    with pytest.raises(CheckpointError, match=wanted):
        load_checkpoint(tmp_path / "c.pt", other)
    with pytest.raises(CheckpointError, match="the model is causal" if causal else "the model is not causal"):
        load_checkpoint(tmp_path / "c.pt", name, not causal)


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "c.pt"
    weights = weights_of(*tiny())

    def message(changed):
        torch.save(changed, path)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        return str(error.value)

    key = "encoder.encoders.1.encoder.layers.1.norm.bias"
    without = {k: v for k, v in weights.items() if k != key}
    assert message(without).endswith("encoder does not fit: " + key.removeprefix("encoder.") + " is missing")
    assert "encoders.0.extra has no place" in message(weights | {"encoder.encoders.0.extra": torch.zeros(1)})
    assert "norm.bias is (7,), not (24,)" in message(weights | {key: torch.zeros(7)})
    assert "no weights of encoder_embed" in message({"decoder.weight": torch.zeros(2)})
    first = "encoder.encoders.0.layers.0.self_attn_weights.linear_pos.weight"
    assert "not a Zipformer: no weights encoders.0" in message({k: v for k, v in weights.items() if k != first})
    assert "not a Zipformer" in message(weights | {first: torch.zeros(3, 12)})
    assert "wanted a state_dict" in message([1, 2])


def test_a_broken_checkpoint_is_told(tmp_path):
    for name, content in {
        "a.pt": b"",
        "b.pt": b"hello, this is no checkpoint",
        "c.safetensors": b"{}",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            load_checkpoint(tmp_path / name)
