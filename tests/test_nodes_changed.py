"""Branches that run as one node, in layers that somebody changed or trains in part: as their modules would."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from draws import generators, seed_all
from test_nodes import BATCH, CHANNELS, FRAMES, MODULES, NODES, assert_same, layer
from torch import nn

from zipformer_kernels import use_backend
from zipformer_kernels.branch.ways import WAYS
from zipformer_kernels.core import backend

pytestmark = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}")


def both(module, change=lambda module: None, training=True, x_trains=True, precision=None, **settings):
    """What a changed layer gives by modules and by nodes, with the gradients of x, of positions and of parameters."""
    results = []
    for ways in (MODULES, NODES):
        copied = copy.deepcopy(module).train(training)
        dtype = copied.norm.bias.dtype
        change(copied)
        seed_all(0)
        x = torch.randn(FRAMES, BATCH, CHANNELS, dtype=dtype, requires_grad=x_trains)
        position = torch.randn(1, 2 * FRAMES - 1, 8, dtype=dtype, requires_grad=x_trains)
        grad = torch.randn(FRAMES, BATCH, CHANNELS, dtype=dtype)
        with mock.patch.dict(WAYS, cpu=ways), use_backend("cpu" if precision is None else "auto"):
            with contextlib.nullcontext() if precision is None else torch.autocast("cpu", precision):
                y = copied(x, position, **settings)
            state = generators()
            if y.requires_grad:
                y.backward(grad)
        leaves = [("x", x), ("position", position), *copied.named_parameters()]
        results.append(({"output": y.detach()} | {n: p.grad for n, p in leaves if p.grad is not None}, state))
    (expected, drawn), (actual, same) = results
    assert same == drawn
    return actual, expected


@pytest.mark.parametrize("name", [name for name, _ in layer().named_parameters() if name != "bypass_scale"])
def test_one_parameter_trains_alone(name):
    """What needs no gradient gets none, and so no Balancer and no Whiten draws for it."""

    def freeze(module):
        for other, parameter in module.named_parameters():
            parameter.requires_grad_(other == name)

    actual, expected = both(layer(), freeze, x_trains=False)
    assert_same(actual, expected)
    assert name in actual


def test_positions_may_be_learned():
    actual, expected = both(layer(), training=False)  # in training they are skipped at random
    assert_same(actual, expected)
    assert actual["position"].abs().max() > 0
    actual, expected = both(layer(dtype=torch.float32), training=False, precision=torch.bfloat16)
    error = (actual["position"] - expected["position"]).norm() / expected["position"].norm()
    assert error < 0.05  # in bfloat16


class InPlace(nn.Module):
    """A bypass that overwrites what it is given."""

    def __init__(self):
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((CHANNELS,), 0.3))

    def forward(self, src_orig, src):
        return src.mul_(-3.0)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_strange_module_overwrites_is_read_anew(training):
    def change(module):
        module.bypass_mid = InPlace().to(module.norm.bias.dtype)

    assert_same(*both(layer(), change, training))
    with torch.no_grad():
        assert_same(*both(layer(), change, training, x_trains=False))
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            actual, expected = both(
                layer(dtype=torch.float32), change, training, x_trains=context is torch.enable_grad,
                precision=torch.bfloat16,
            )  # fmt: skip
        assert (actual["output"] - expected["output"]).norm() < 0.02 * expected["output"].norm()


def test_the_convolution_that_stands_there_runs():
    """Whatever the flag `causal` says; without chunks upstream does not ask for it."""

    def flag(causal):
        def change(module):
            module.conv_module1.causal = causal

        return change

    assert_same(*both(layer(causal=False), flag(True)))
    assert_same(*both(layer(causal=True), flag(False)))
    for ways in (MODULES, NODES):
        with mock.patch.dict(WAYS, cpu=ways), pytest.raises(ValueError, match="chunk_size must not be 0"):
            layer(causal=True)(torch.randn(4, 1, CHANNELS).double(), torch.randn(1, 7, 8).double(), chunk_size=0)


def test_a_norm_over_the_frames():
    def change(module):
        module.norm.channel_dim, module.norm.num_channels = 0, FRAMES
        module.norm.bias = nn.Parameter(torch.randn(FRAMES, generator=torch.Generator().manual_seed(0)).double())

    assert_same(*both(layer(), change))


def test_a_product_of_one_channel_is_added_to_all():
    def change(module):
        last = module.self_attn1.out_proj
        last.weight, last.bias = (nn.Parameter(p.detach()[:1].clone()) for p in (last.weight, last.bias))

    assert_same(*both(layer(), change))
