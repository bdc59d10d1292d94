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


class Whiten(nn.Module):
    """A class of the same name that has nothing to do with upstream."""

    def forward(self, x):
        return x


class ScaleGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = 1.0

    def forward(self, x, scale):
        return x


class WithMore(upstream.scaling.BiasNorm):
    def scale(self):
        return self.log_scale.exp()


def same_name(base, **body):
    return type(base.__name__, (base,), body)


def with_attributes(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def swooshed(**replaced):
    return with_attributes(upstream.scaling.ActivationDropoutAndLinear(4, 6), **replaced)


scaling = upstream.scaling
UNKNOWN = "its forward is none of the known versions of "
KEPT = {
    "subclass": (lambda: LoudBalancer(4, -1), UNKNOWN + r"Balancer; .* pass trust=\['LoudBalancer'\]"),
    "subclass of the same name": (
        lambda: same_name(scaling.BiasNorm, forward=lambda self, x: 2 * x)(4),
        "its source cannot be had, and a trial run in evaluation disagrees: results differ by",
    ),
    "subclass with another method": (lambda: WithMore(4), "it has scale, which ours has not"),
    "patched object": (
        lambda: with_attributes(scaling.BiasNorm(4), forward=lambda x: 2 * x),
        "its forward was replaced on the object",
    ),
    "nothing but the name": (Whiten, UNKNOWN + "Whiten"),
    "another forward": (ScaleGrad, UNKNOWN + "ScaleGrad"),
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
    "another function": (lambda: with_attributes(scaling.SwooshL(), func=torch.tanh), UNKNOWN + "SwooshL"),
    "another convolution": (
        lambda: with_attributes(scaling.ChunkCausalDepthwiseConv1d(4, 7), kernel_size=5),
        r"its causal_conv.weight has shape \(4, 1, 4\), wanted \(4, 1, 3\)",
    ),
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
    kept = {path: (name, why) for path, name, why in report.not_swapped}
    assert kept["1"][0] == type(odd).__name__
    assert re.search(reason, kept["1"][1]), kept["1"]
    assert "1" not in dict(report.swapped)
    assert type(model[1]) is before["1"][0]
    assert f"  {type(odd).__name__}: {kept['1'][1]}\n      1\n" in str(report)


def special(module):
    """Gives a module a class of someone else's, which calls upstream's with tensors of its own, and scales."""

    class Special(type(module)):
        def forward(self, x, *args, **kwargs):
            args = [arg.clone() if isinstance(arg, torch.Tensor) or hasattr(arg, "clone") else arg for arg in args]
            if kwargs.get("attn_mask") is not None:
                assert kwargs["attn_mask"].dtype == torch.bool
            return 0.9 * super().forward(x, *args, **kwargs)

    module.__class__ = Special


PATH = "encoder.encoders.1.encoder.layers.0"
PARTS = (
    *("", ".self_attn_weights", ".self_attn1", ".nonlin_attention", ".conv_module1", ".conv_module1.depthwise_conv"),
    *(".feed_forward2", ".bypass", ".norm", ".balancer1"),
)


@pytest.mark.parametrize("path", [*(PATH + part for part in PARTS), "encoder.encoders.1", "encoder.encoders.1.encoder"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_part_of_someone_elses(path, train):
    """It stays, and all around it is swapped and calls it."""
    model = build(**CAUSAL).train(train)
    special(model.get_submodule(path))
    theirs = copy.deepcopy(model)
    report = convert(model)
    assert [(kept[0], kept[1]) for kept in report.not_swapped] == [(path, "Special")]
    for seed in range(3):
        assert_same_run(model, theirs, batch(), seed=seed)
    if not train:
        with torch.no_grad():
            assert_same_run(model, theirs, batch())


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
