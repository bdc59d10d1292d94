"""Checkpoints in all the forms they come in: the weights found in them, and the sizes read off them."""

import pathlib
import pickle

import pytest
import safetensors.torch
import torch
from tiny import TINY, tiny, weights_of
from torch import nn
from upstream import subsampling

from zipformer_kernels import Conv2dSubsampling, Zipformer, load_checkpoint, load_encoder
from zipformer_kernels.checkpoint import CheckpointError
from zipformer_kernels.checkpoint.sizes import check_preset, encoder_arguments
from zipformer_kernels.presets import PRESETS


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.pt"


def assert_same(ours, theirs):
    assert not ours.training
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


def assert_same_attributes(ours, theirs):
    names = "downsampling_factor encoder_dim num_encoder_layers query_head_dim value_head_dim num_heads causal"
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name


# ---- forms ----


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "form", ["icefall", "plain", "safetensors", "half", "legacy", "pickle", "lightning", "deepspeed"]
)
def test_every_form_of_checkpoint_loads(path, form, causal):
    embed, encoder = tiny(causal, seed=3)
    weights = weights_of(embed, encoder)
    if form == "safetensors":
        safetensors.torch.save_file(weights, path)
    elif form == "half":
        embed, encoder = embed.half().float(), encoder.half().float()
        torch.save({key: value.half() for key, value in weights.items()}, path)
    elif form == "plain":
        torch.save(weights, path)
    elif form == "legacy":
        torch.save({"model": weights, "step": 3}, path, _use_new_zipfile_serialization=False)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"model": weights}))
    elif form == "lightning":
        content = {f"model.{key}": value for key, value in weights.items()}
        torch.save({"state_dict": content, "callbacks": {}, "epoch": 3}, path)
    elif form == "deepspeed":
        torch.save({"module": weights, "dp_world_size": 1}, path)
    else:
        extras = {"exp_dir": pathlib.Path("zipformer/exp"), "epoch": 30, "optimizer": {"state": [1.5, None]}}
        torch.save({"model": weights, "model_avg": None, **extras}, path)
    ours = load_checkpoint(path)
    for one, other in zip(ours, (embed, encoder), strict=True):
        assert_same(one, other)
    assert_same_attributes(ours[1], encoder)


@pytest.mark.parametrize(
    "before",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model.module._orig_mod.", "net."],
)
def test_what_wrappers_put_before_names_is_left_out(path, before):
    embed, encoder = tiny()
    torch.save({"model": weights_of(embed, encoder, before)}, path)
    for ours, theirs in zip(load_checkpoint(path), (embed, encoder), strict=True):
        assert_same(ours, theirs)


def test_the_wrappers_of_torch_itself(path):
    embed, encoder = tiny()
    model = nn.ModuleDict({"encoder_embed": embed, "encoder": torch.compile(encoder)})
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(nn.Sequential()))
    averaged.module = torch.compile(nn.DataParallel(model))
    state = averaged.state_dict()
    assert "n_averaged" in state
    assert "module._orig_mod.module.encoder._orig_mod.downsample_output.bias" in state
    torch.save(state, path)
    for ours, theirs in zip(load_checkpoint(path), (embed, encoder), strict=True):
        assert_same(ours, theirs)


def test_of_several_encoders_one_is_named(path):
    (embed, encoder), (other_embed, other) = tiny(), tiny(seed=1)
    both = weights_of(embed, encoder, "model.") | weights_of(other_embed, other, "teacher.module.")
    torch.save({"state_dict": both}, path)
    for load in (load_checkpoint, load_encoder):
        with pytest.raises(
            CheckpointError, match=r"prefix: it holds several encoders, wanted one of model\., teacher\."
        ):
            load(path)
        with pytest.raises(CheckpointError, match=r"prefix 'student': no weights of encoder"):
            load(path, prefix="student")
    assert_same(load_checkpoint(path, prefix="teacher")[1], other)
    assert_same(load_encoder(path, prefix="model."), encoder)
    bare = weights_of(embed, encoder) | weights_of(other_embed, other, "teacher.")
    torch.save(bare, path)
    assert_same(load_checkpoint(path)[1], encoder)  # the teacher is one of the other parts
    torch.save(bare | weights_of(embed, encoder, "module."), path)
    with pytest.raises(CheckpointError, match="twice, once as module"):
        load_checkpoint(path)


def test_an_encoder_alone(path):
    embed, encoder = tiny(causal=True)
    for state in (encoder.state_dict(), {f"encoder.{k}": v for k, v in encoder.state_dict().items()}):
        torch.save(state, path)
        ours = load_encoder(path, causal=True)
        assert_same(ours, encoder)
        assert_same_attributes(ours, encoder)
        with pytest.raises(CheckpointError, match=r"load_encoder|no weights of encoder"):
            load_checkpoint(path)
    torch.save(weights_of(embed, encoder), path)
    assert_same(load_encoder(path), encoder)


def test_the_average_over_the_training_when_asked(path):
    last, average = tiny(seed=1), tiny(seed=2)
    torch.save({"model": weights_of(*last), "model_avg": weights_of(*average)}, path)
    for asked, wanted in ((False, last), (True, average)):
        for ours, theirs in zip(load_checkpoint(path, model_avg=asked), wanted, strict=True):
            assert_same(ours, theirs)
        assert_same(load_encoder(path, model_avg=asked), wanted[1])
    torch.save({"model": weights_of(*last), "model_avg": None}, path)
    with pytest.raises(CheckpointError, match="model_avg: it holds none"):
        load_checkpoint(path, model_avg=True)


def test_tensors_that_share_memory_or_are_views(path):
    embed, encoder = tiny()
    weights = weights_of(embed, encoder)
    flat = torch.cat([value.flatten() for value in weights.values()])
    views = dict(zip(weights, flat.split([value.numel() for value in weights.values()]), strict=True))
    views = {key: view.view(weights[key].shape) for key, view in views.items()}
    key = "encoder.encoders.0.layers.0.self_attn1.in_proj.weight"
    views[key] = weights[key].t().contiguous().t()
    torch.save(views, path)
    for ours, theirs in zip(load_checkpoint(path), (embed, encoder), strict=True):
        assert_same(ours, theirs)


# ---- sizes ----


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised(name, causal):
    with torch.device("meta"):
        state = Zipformer.from_preset(name, causal=causal).state_dict()
    arguments = encoder_arguments(state, {}, {})
    assert arguments["encoder_unmasked_dim"] == PRESETS[name]["encoder_unmasked_dim"]
    assert arguments["causal"] == causal
    assert arguments.get("chunk_size") == ((16, 32, 64, -1) if causal else None)
    check_preset(arguments, name)
    other = next(preset for preset in PRESETS if preset != name)
    wanted = rf"does not fit preset {other} \(it has the sizes of preset {name}\): .*encoder_dim is \("
    with pytest.raises(CheckpointError, match=wanted):
        check_preset(arguments, other)


def test_a_preset_and_causality_are_required_when_asked(path):
    torch.save(weights_of(*tiny(causal=True)), path)
    with pytest.raises(CheckpointError, match=r"c.pt: does not fit preset S: "):
        load_checkpoint(path, "S")
    with pytest.raises(CheckpointError, match=r"c.pt: the model is causal"):
        load_checkpoint(path, causal=False)
    torch.save(weights_of(*tiny()), path)
    with pytest.raises(CheckpointError, match=r"c.pt: the model is not causal"):
        load_checkpoint(path, causal=True)
    with pytest.raises(ValueError, match=r"^preset: wanted one of S, M, L.*, got 'Z'"):
        load_checkpoint(path, "Z")


def with_heads(**sizes):
    torch.manual_seed(0)
    return Conv2dSubsampling(80, 16, 4, 6, 8).eval(), Zipformer(**{**TINY, **sizes}).eval()


def same_output(ours, theirs):
    x, lengths = torch.randn(20, 2, 16), torch.tensor([20, 15])
    with torch.no_grad():
        return torch.equal(ours(x, lengths)[0], theirs(x, lengths)[0])


@pytest.mark.parametrize(("pos_head_dim", "query_head_dim"), [(2, 32), (8, 32), (16, 32), ((2, 8), 32), (4, 8)])
def test_heads_that_shapes_do_not_tell_are_asked_for(path, pos_head_dim, query_head_dim):
    sizes = {"num_heads": (4, 2), "pos_head_dim": pos_head_dim, "query_head_dim": query_head_dim}
    embed, encoder = with_heads(**sizes, value_head_dim=12)
    torch.save(weights_of(embed, encoder), path)
    with pytest.raises(
        CheckpointError, match=r"num_heads: the weights of stack 0 fit .*: say which by num_heads, pos_"
    ):
        load_checkpoint(path)
    for name, value in {**sizes, "value_head_dim": 12}.items():
        ours = load_encoder(path, **{name: value})
        assert_same_attributes(ours, encoder)
        assert same_output(ours, encoder)
    assert_same_attributes(load_encoder(path, num_heads="4, 2", pos_head_dim=None), encoder)
    with pytest.raises(CheckpointError, match=r"num_heads 3: does not fit the weights of stack 0, but num_heads 1, "):
        load_encoder(path, num_heads=3)
    with pytest.raises(CheckpointError, match=r"num_heads 4, pos_head_dim 1: does not fit the weights of stack 0"):
        load_encoder(path, num_heads=(4, 2), pos_head_dim=1)
    with pytest.raises(CheckpointError, match=r"num_heads: wanted one number or 2, one per stack, got \(4, 2, 2\)"):
        load_encoder(path, num_heads=(4, 2, 2))
    with pytest.raises(CheckpointError, match=r"pos_head_dim: wanted a whole number or several, got 4.0"):
        load_encoder(path, pos_head_dim=4.0)


def test_heads_of_published_recipes_and_the_only_possible_ones_need_no_argument(path):
    for sizes in (
        {"num_heads": (4, 2), "query_head_dim": 48, "value_head_dim": 18},
        {"num_heads": 1, "query_head_dim": 7, "value_head_dim": 5},
        {"num_heads": (1, 2), "query_head_dim": (7, 32), "value_head_dim": (5, 12)},
    ):
        embed, encoder = with_heads(**sizes)
        torch.save(weights_of(embed, encoder), path)
        ours = load_checkpoint(path)[1]
        assert_same_attributes(ours, encoder)
        assert same_output(ours, encoder)


ICEFALL = {  # as icefall's recipes write them into epoch-*.pt
    "num_heads": "4,2",
    "pos_head_dim": "8",
    "query_head_dim": "32",
    "value_head_dim": "12",
    "encoder_unmasked_dim": "8,12",
    "chunk_size": "8,16,-1",
    "left_context_frames": "64,-1",
    "feature_dim": 82,
}


@pytest.mark.parametrize("where", ["beside", "hyper_parameters"])
def test_parameters_beside_the_weights_tell(path, where):
    sizes = {"num_heads": (4, 2), "pos_head_dim": 8, "causal": True}
    embed, encoder = with_heads(**sizes)
    weights = weights_of(embed, encoder)
    torch.save({"model": weights, **(ICEFALL if where == "beside" else {where: ICEFALL})}, path)
    our_embed, ours = load_checkpoint(path)
    assert our_embed.in_channels == 82
    assert_same_attributes(ours, encoder)
    assert ours.encoder_unmasked_dim == (8, 12)
    assert ours.chunk_size == (8, 16, -1)
    assert ours.left_context_frames == (64, -1)
    assert load_encoder(path, num_heads=(8, 4)).query_head_dim == (16, 16)  # what the caller says holds
    for name, value, message in (
        ("num_heads", "8,4", r"num_heads 8, .* in the parameters that the checkpoint holds: does not fit the weights"),
        ("num_heads", "4,x", r"num_heads: wanted a whole number or several, got '4,x'"),
        ("feature_dim", 90, r"feature_dim: the weights are for 79 to 82 bins, got 90"),
        ("encoder_unmasked_dim", "99", r"not a Zipformer: encoder_unmasked_dim: 99 exceeds the stack's encoder_dim 16"),
    ):
        torch.save({"model": weights, **ICEFALL, name: value}, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)


@pytest.mark.parametrize("bins", [23, 81, 82, 83])
def test_any_number_of_bins(path, bins):
    torch.manual_seed(0)
    theirs = subsampling.Conv2dSubsampling(bins, 16, 4, 6, 8).eval()
    torch.save(weights_of(theirs, tiny()[1]), path)
    embed = load_checkpoint(path)[0]
    assert embed.in_channels is None
    x, lengths = torch.randn(1, 12, bins), torch.tensor([12])
    with torch.no_grad():
        expected = theirs(x, lengths)[0]
        for ours in (embed, load_checkpoint(path, feature_dim=bins)[0]):
            assert (ours(x, lengths)[0] - expected).square().mean() < 1e-10 * expected.square().mean()
        with pytest.raises(ValueError, match=rf"x: wanted \(batch, frames, {bins}\)"):
            load_checkpoint(path, feature_dim=bins)[0](x[..., 1:], lengths)
    for wrong in (bins + 4, 0, 80.0, "eighty"):
        with pytest.raises(CheckpointError, match=r"feature_dim: (the weights are for|wanted a whole number)"):
            load_checkpoint(path, feature_dim=wrong)


def test_weights_that_do_not_fit_are_named(path):
    weights = weights_of(*tiny())

    def message(changed):
        torch.save(changed, path)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert str(error.value).startswith(f"{path}: ")
        return str(error.value)

    def without(start):
        return {key: value for key, value in weights.items() if not key.startswith(start)}

    key = "encoder.encoders.1.encoder.layers.1.norm.bias"
    assert message(without(key)).endswith("encoder does not fit: " + key.removeprefix("encoder.") + " is missing")
    assert "encoders.0.extra has no place" in message(weights | {"encoder.encoders.0.extra": torch.zeros(1)})
    assert "norm.bias is (7,), not (24,)" in message(weights | {key: torch.zeros(7)})
    assert "norm.bias is of torch.int8, not floating-point" in message(weights | {key: weights[key].to(torch.int8)})
    assert f"{key}: is of type int, wanted a plain tensor" in message(weights | {key: 3})
    assert f"{key}: is an object of torch._utils._rebuild_sparse_tensor" in message(
        weights | {key: weights[key].to_sparse()}
    )
    assert "no weights of encoder.encoders.*, but decoder.weight" in message({"decoder.weight": torch.zeros(2)})
    assert "no weights of encoder_embed.*, but encoder." in message(without("encoder_embed."))
    first = "encoder.encoders.0.layers.0.self_attn_weights.linear_pos.weight"
    assert f"not a Zipformer: no weights {first}" in message(without(first))
    assert "not a Zipformer: 63 rows for the queries" in message(weights | {first: torch.zeros(73, 12)})
    assert f"not a Zipformer: {first} is (), wanted 2" in message(weights | {first: torch.zeros(())})
    assert "not a Zipformer: stacks with positions of 1" in message(weights | {first: torch.zeros(8, 13)})
    for stack, start in ((0, "encoder.encoders.0.layers."), (1, "encoder.encoders.1.encoder.layers.")):
        assert f"stack {stack} has no layers" in message(without(start))
    assert "encoder.downsample_output.bias" in message(without("encoder.downsample_output"))  # as of icefall's SSL
    assert "wanted a state_dict" in message([1, 2])
    assert "is a pickled torch.nn.Module" in message({"model": nn.ModuleDict({"encoder": tiny()[1]})})
    assert "out.weight takes 153 numbers" in message(weights | {"encoder_embed.out.weight": torch.zeros(16, 153)})
