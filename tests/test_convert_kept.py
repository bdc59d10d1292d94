"""What `convert` does not swap, and says why."""

import copy
import re

import pytest
import torch
import upstream
from torch import nn
from upstream_models import BINS, CAUSAL, assert_same_run, batch, build, snapshot

from zipformer_kernels.convert import convert, revert


class LoudBalancer(upstream.scaling.Balancer):
    def forward(self, x):
        return super().forward(2 * x)


def same_name(base, **body):
    return type(base.__name__, (base,), body)


def alien(name, **body):
    """A class of the same name that has nothing to do with upstream."""
    return type(name, (nn.Module,), {"forward": lambda self, x: x, **body})()


def with_attributes(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def swooshed(**replaced):
    return with_attributes(upstream.scaling.ActivationDropoutAndLinear(4, 6), **replaced)


scaling = upstream.scaling
KEPT = {
    "subclass": (lambda: LoudBalancer(4, -1), "a subclass of Balancer"),
    "subclass of the same name": (
        lambda: same_name(scaling.BiasNorm, forward=lambda self, x: 2 * x)(4),
        "a subclass of BiasNorm",
    ),
    "patched object": (
        lambda: with_attributes(scaling.BiasNorm(4), forward=lambda x: 2 * x),
        "its forward was replaced",
    ),
    "nothing but the name": (lambda: alien("Whiten"), "it has no grad_scale, max_prob"),
    "more parameters": (
        lambda: with_attributes(upstream.zipformer.SimpleUpsample(4, 2), bias=nn.Parameter(torch.zeros(2, 4))),
        "it has bias, which ours would not use",
    ),
    "more children": (lambda: with_attributes(scaling.SwooshR(), norm=nn.LayerNorm(4)), "it has norm"),
    "another shape": (
        lambda: with_attributes(scaling.BiasNorm(4), bias=nn.Parameter(torch.zeros(1, 4))),
        r"its bias has shape \(1, 4\), wanted \(4,\)",
    ),
    "a bias that does not fit": (
        lambda: swooshed(bias=nn.Parameter(torch.zeros(4))),
        r"its bias has shape \(4,\), wanted \(6,\)",
    ),
    "other arguments": (
        lambda: alien("ScaleGrad", alpha=1.0, forward=lambda self, x, scale: x).requires_grad_(),
        r"has no alpha",
    ),
    "another forward": (
        lambda: with_attributes(alien("ScaleGrad", forward=lambda self, x, scale: x), alpha=1.0),
        r"its forward takes \(x, scale\), wanted \(x\)",
    ),
    "another convolution": (
        lambda: with_attributes(scaling.ChunkCausalDepthwiseConv1d(4, 7), kernel_size=5),
        r"its causal_conv.weight has shape \(4, 1, 4\), wanted \(4, 1, 3\)",
    ),
    "attention alone": (lambda: upstream.zipformer.SelfAttention(8, 2, 3), "there is no layer around it"),
    "another linear layer": (
        lambda: with_attributes(upstream.zipformer.SelfAttention(8, 2, 3), in_proj=nn.Identity()),
        "has no attribute 'weight'",
    ),
}


@pytest.mark.parametrize(("make", "reason"), KEPT.values(), ids=KEPT)
def test_kept(make, reason):
    odd = make()
    model = nn.Sequential(nn.Linear(4, 4), odd)
    before = snapshot(model)
    report = convert(model)
    kept = {path: (name, why) for path, name, why in report.kept}
    assert kept["1"][0] == type(odd).__name__
    assert re.search(reason, kept["1"][1]), kept["1"]
    assert "1" not in dict(report.swapped)
    assert type(model[1]) is before["1"][0]
    assert f"1 ({type(odd).__name__}): {kept['1'][1]}" in str(report)


@pytest.mark.parametrize("part", ["self_attn_weights", "self_attn1", "self_attn2", "nonlin_attention"])
def test_attention_is_swapped_as_a_whole(part):
    """One part of one layer of someone else's: the layer and all around it stay; the other layers do not."""
    model = build(**CAUSAL).train()
    layer = model.encoder.encoders[1].encoder.layers[0]
    odd = getattr(layer, part)
    odd.__class__ = type("Special", (type(odd),), {})
    theirs = copy.deepcopy(model)
    report = convert(model)
    path = "encoder.encoders.1.encoder.layers.0"
    around = ["encoder", "encoder.encoders.1", "encoder.encoders.1.encoder", path]
    parts = [f"{path}.{name}" for name in ("nonlin_attention", "self_attn1", "self_attn2", "self_attn_weights")]
    assert sorted(kept[0] for kept in report.kept) == sorted(around + parts)
    assert {"encoder.encoders.0", "encoder.encoders.1.encoder.layers.1", f"{path}.norm"} <= dict(report.swapped).keys()
    for seed in range(3):
        assert_same_run(model, theirs, batch(), seed=seed)


def test_a_stack_of_someone_elses():
    """The encoder hands masks to its stacks: it stays too."""
    model = build(**CAUSAL).train()
    stack = model.encoder.encoders[1]
    stack.__class__ = type("Special", (type(stack),), {})
    theirs = copy.deepcopy(model)
    report = convert(model)
    assert [kept[0] for kept in report.kept] == ["encoder", "encoder.encoders.1"]
    for seed in range(3):
        assert_same_run(model, theirs, batch(), seed=seed)


def test_conv_embed_refuses_other_bins():
    embed = upstream.subsampling.Conv2dSubsampling(BINS, 12)
    convert(embed)
    with pytest.raises(ValueError, match=r"x: wanted \(batch, frames, 19 to 22 bins\)"):
        embed(torch.zeros(2, 30, 23), torch.tensor([30, 30]))


@pytest.mark.parametrize(
    ("model", "ops", "error", "message"),
    [
        (nn.Linear(2, 2).state_dict(), None, TypeError, "model: wanted a torch.nn.Module, got OrderedDict"),
        (nn.Linear(2, 2), "swoosh", TypeError, "ops: wanted a collection of names, got the string 'swoosh'"),
        (
            nn.Linear(2, 2),
            ["swoosh", "flash"],
            ValueError,
            "ops: wanted names among attention, bias_norm, .*, got flash",
        ),
    ],
)
def test_bad_arguments(model, ops, error, message):
    with pytest.raises(error, match=message):
        convert(model, ops)


def test_revert_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"model: wanted a torch.nn.Module, got dict"):
        revert({})
