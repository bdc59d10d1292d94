"""`zipformer_kernels.scaling` stands in for upstream's ``scaling.py``."""

import importlib.util
import sys
from unittest import mock

import pytest
import torch
import upstream
from parity import assert_same_run, build_pair
from test_encoder_upstream import CONFIG, batch
from torch import nn

import zipformer_kernels
from zipformer_kernels import optim, scaling

# What the files of icefall's ASR/zipformer, its tests among them, import from scaling.
IMPORTED = [
    "ActivationDropoutAndLinear",
    "Balancer",
    "BiasNorm",
    "ChunkCausalDepthwiseConv1d",
    "Dropout2",
    "Dropout3",
    "FloatLike",
    "Identity",
    "Optional",
    "PiecewiseLinear",
    "ScaleGrad",
    "ScaledConv2d",
    "ScaledLinear",
    "ScheduledFloat",
    "SwooshL",
    "SwooshLOnnx",
    "SwooshR",
    "SwooshROnnx",
    "Whiten",
    "convert_num_channels",
    "limit_param_value",
    "penalize_abs_values_gt",
    "softmax",
]


@pytest.mark.parametrize("name", IMPORTED)
def test_names(name):
    ours, theirs = getattr(scaling, name), getattr(upstream.scaling, name)
    assert isinstance(ours, type) == isinstance(theirs, type)
    if name != "Optional":
        assert getattr(zipformer_kernels, name) is ours


def on_ours(name):
    """Upstream's module of a name, its file unaltered, on our ``scaling``."""
    spec = importlib.util.spec_from_file_location(f"{name}_on_ours", getattr(upstream, name).__file__)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"zipformer.modules.scaling": scaling}):
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("chunks", [{}, {"causal": True, "chunk_size": (8,), "left_context_frames": (32,)}])
def test_upstreams_encoder_on_ours(chunks, train):
    module = on_ours("zipformer")
    ours, theirs = build_pair(module.Zipformer, upstream.zipformer.Zipformer, **CONFIG, **chunks)
    assert_same_run(ours.train(train), theirs.train(train), batch(CONFIG, [21, 13]))


@pytest.mark.parametrize("train", [False, True])
def test_upstreams_conv_embed_on_ours(train):
    module = on_ours("subsampling")
    args = 20, 16, 4, 8, 6
    ours, theirs = build_pair(module.Conv2dSubsampling, upstream.subsampling.Conv2dSubsampling, *args)
    x = torch.randn(2, 31, 20, dtype=torch.float64)
    assert_same_run(ours.train(train), theirs.train(train), [x, torch.tensor([31, 20])])


@pytest.mark.parametrize("dim", [0, -1])
def test_softmax(dim):
    class Softmax(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x, dim)

    x = torch.randn(5, 7, dtype=torch.float64)
    assert_same_run(Softmax(scaling.softmax), Softmax(upstream.scaling.softmax), [x])
    with torch.autocast("cpu", torch.bfloat16):
        assert scaling.softmax(torch.randn(5, 7), dim).dtype == torch.bfloat16


def test_schedules_have_the_base_that_training_scripts_name():
    assert issubclass(optim.Eden, optim.LRScheduler)
    assert issubclass(optim.Eden2, optim.LRScheduler)
