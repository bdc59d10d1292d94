"""Modules and models made and trained where tensors have no values: on device ``meta`` and under a FakeTensorMode.

So people plan memory and how to shard a model. What looks at values elsewhere (Whiten at its metric, masks that keep
everything, lengths) goes on without.
"""

import random
from unittest import mock

import pytest
import torch
from test_modules_upstream import CASES, our
from tiny import TINY
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from zipformer_kernels import Conv2dSubsampling, Zipformer2
from zipformer_kernels.core.call import has_values
from zipformer_kernels.ops.attention import AttentionWeights
from zipformer_kernels.training import Balancer, ScaleGrad, Whiten, limit_param_value, penalize_abs_values_gt

PLACES = {"meta": lambda: torch.device("meta"), "fake": FakeTensorMode}

everywhere = pytest.mark.parametrize("place", PLACES)
# What Python's generator gives: at 0 all that is drawn happens, at nearly 1 what is certain.
either_draw = pytest.mark.parametrize("drawn", [0.0, 0.999], ids=["all happens", "little happens"])


def train(module, args, kwargs, drawn):
    """A step in train mode: shapes and dtypes of results and of all gradients, None for those that are missing."""
    args = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    with mock.patch.object(random, "random", return_value=drawn):
        outputs = module.train()(*args, **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [out.materialize() if isinstance(out, AttentionWeights) else out for out in outputs]
        floats = [out for out in outputs if out.requires_grad]
        torch.autograd.backward(floats, [torch.ones_like(out) for out in floats])
    found = [*outputs, *(x.grad for x in (*args, *module.parameters()))]
    return [None if x is None else (x.shape, x.dtype) for x in found], outputs


def check(make, inputs, kwargs, drawn, place):
    """A module made and trained in a place does there what it does elsewhere, as far as it shows."""
    expected, _ = train(make(), inputs(), kwargs, drawn)
    with PLACES[place]():
        moved = tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), kwargs)
        found, outputs = train(make(), inputs(), moved, drawn)
    assert found == expected
    assert not any(map(has_values, outputs))


@everywhere
@pytest.mark.parametrize("case", CASES)
def test_modules_train(case, place):
    (_, name, args, options), inputs, kwargs = CASES[case]
    check(lambda: our(name)(*args, **options), lambda: [x.float() for x in inputs()], kwargs, 0.0, place)


class Called(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


HOOKS = {
    "Balancer": lambda: Balancer(4, -1, prob=1.0),
    "Whiten": lambda: Whiten(2, 1.0, prob=1.0, grad_scale=0.1),
    "Whiten of two probabilities": lambda: Whiten(1, 5.0, prob=(0.025, 0.25), grad_scale=0.1),
    "ScaleGrad": lambda: ScaleGrad(0.5),
    "limit": lambda: Called(lambda x: limit_param_value(x, -1.0, 1.0)),
    "penalty": lambda: Called(lambda x: penalize_abs_values_gt(x, 1.0, 0.1)),
}


@everywhere
@either_draw
@pytest.mark.parametrize("hook", HOOKS)
def test_what_changes_gradients(hook, drawn, place):
    check(HOOKS[hook], lambda: (torch.randn(7, 2, 4),), {}, drawn, place)


@everywhere
@either_draw
@pytest.mark.parametrize("causal", [False, True], ids=["offline", "causal"])
def test_models_train(causal, drawn, place):
    chunks = {"causal": True, "chunk_size": (8,), "left_context_frames": (16,)} if causal else {}
    frames = lambda: (torch.randn(21, 2, 16), torch.full((2,), 21))  # noqa: E731
    padding = {"src_key_padding_mask": torch.zeros(2, 21, dtype=torch.bool)}
    check(lambda: Zipformer2(**TINY, **chunks), frames, padding, drawn, place)


@everywhere
@either_draw
def test_conv_embeds_train(drawn, place):
    make = lambda: Conv2dSubsampling(20, 16, layer1_channels=4, layer2_channels=6, layer3_channels=8)  # noqa: E731
    check(make, lambda: (torch.randn(2, 40, 20), torch.full((2,), 40)), {}, drawn, place)


@everywhere
def test_models_encode(place):
    with PLACES[place](), torch.no_grad():
        embed = Conv2dSubsampling(20, 16, layer1_channels=4, layer2_channels=6, layer3_channels=8).eval()
        model = Zipformer2(**TINY, causal=True, chunk_size=(8,), left_context_frames=(16,)).eval()
        x, lengths = embed(torch.randn(2, 40, 20), torch.full((2,), 40))
        out, _ = model(x.permute(1, 0, 2), lengths)
        assert out.shape == (8, 2, 24)
        states = model.get_init_states(2, device=x.device)
        mask = torch.zeros(2, 16 + 16, dtype=torch.bool)
        chunk, _, states = model.streaming_forward(torch.randn(16, 2, 16), torch.full((2,), 16), states, mask)
        assert chunk.shape == (8, 2, 24)
        assert not any(map(has_values, (out, chunk, *states)))
