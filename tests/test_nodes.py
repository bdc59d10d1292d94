"""Branches that run as one node of the graph, as on a GPU: the same numbers, gradients and draws as by modules."""

import contextlib
import copy
import random
from unittest import mock

import pytest
import torch
from draws import generators, seed_all, set_batch_count
from tolerances import PARITY, assert_agrees
from torch import nn

from zipformer_kernels import use_backend
from zipformer_kernels.branch.node import Handed
from zipformer_kernels.branch.nodes import cast
from zipformer_kernels.branch.ways import WAYS
from zipformer_kernels.core import backend
from zipformer_kernels.modules import ZipformerEncoderLayer
from zipformer_kernels.training import Balancer, Whiten

FRAMES, BATCH, CHANNELS = 11, 3, 16
NODES, MODULES = WAYS["cuda"], ()

pytestmark = pytest.mark.skipif(backend.missing["cpu"] is not None, reason=f"cpu: {backend.missing['cpu']}")


def layer(causal=False, dtype=torch.float64, batch_count=500.0, **settings):
    seed_all(0)
    made = ZipformerEncoderLayer(CHANNELS, 8, 4, 8, 4, 4, 24, cnn_module_kernel=7, causal=causal, **settings)
    set_batch_count(made, batch_count)
    return made.to(dtype)


def run(ways, module, seed=0, training=True, precision=contextlib.nullcontext, after=None, frames=FRAMES, **settings):
    """Output, all gradients by name, and the generators' states, of a copy of a layer in which branches run so."""
    module = copy.deepcopy(module).train(training)
    dtype = module.norm.bias.dtype
    seed_all(seed)
    x = torch.randn(frames, BATCH, CHANNELS, dtype=dtype, requires_grad=True)
    position, grad = torch.randn(1, 2 * frames - 1, 8, dtype=dtype), torch.randn(frames, BATCH, CHANNELS, dtype=dtype)
    padding = torch.arange(frames) >= torch.tensor([[frames], [8], [frames]])
    if after is not None:
        after(module)
    with mock.patch.dict(WAYS, cpu=ways), use_backend("cpu"):
        with precision():
            y = module(x, position, src_key_padding_mask=padding, **settings)
        state = generators()
        y.backward(grad)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "x": x.grad} | grads, state


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        if name == "self_attn_weights.in_proj.bias":  # that of keys is zero but for rounding
            assert (actual[name] - wanted).abs().max() < 1e-12 * max(x.abs().max() for x in expected.values())
            continue
        size = wanted.abs().max().clamp(min=1e-12)
        assert (actual[name] - wanted).abs().max() <= 1e-11 * size, name


@pytest.mark.parametrize("causal", [False, True], ids=["offline", "causal"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("batch_count", [500.0, 6000.0, 60_000.0])
def test_nodes_give_what_modules_give_and_draw_what_they_draw(causal, training, batch_count):
    """Balancers, Whiten, limits, skipped sequences and dropout act here and there, as seeds have it."""
    module, settings = layer(causal, batch_count=batch_count), {"chunk_size": 4} if causal else {}
    for seed in range(8):
        expected, state = run(MODULES, module, seed, training, **settings)
        actual, same = run(NODES, module, seed, training, **settings)
        assert_same(actual, expected)
        assert same == state


def act_always(module):
    """Every Balancer and every Whiten acts on every call."""
    for part in list(module.modules()):
        if isinstance(part, Balancer):
            part._modules.pop("prob", None)  # its schedule
            part.prob = 1.0
        if isinstance(part, Whiten):
            part._modules.pop("whitening_limit", None)
            part.whitening_limit, part.prob, part.min_prob, part.max_prob = 1.0, 1.0, 1.0, 1.0


def test_changes_of_gradients_act_at_their_places():
    module = layer()
    expected, state = run(MODULES, module, after=act_always)
    without, _ = run(MODULES, module, after=lambda _: None)
    actual, same = run(NODES, module, after=act_always)
    assert_same(actual, expected)
    assert same == state
    moved = sum((expected[name] - without[name]).abs().max() > 1e-6 for name in expected if name in without)
    assert moved > 20


@pytest.mark.parametrize("frozen", ["self_attn", "out_proj", "in_proj.weight", "bias", "conv_module1", "x"])
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(frozen):
    module = layer()

    def freeze(module):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen not in name)

    expected, _ = run(MODULES, module, after=freeze)
    actual, _ = run(NODES, module, after=freeze)
    assert_same(actual, expected)


def share_over_nothing(module):
    module.feed_forward2.out_proj.dropout_shared_dim = None


def drop_behind_the_convolution(module):
    module.conv_module1.out_proj.dropout_p, module.conv_module1.out_proj.dropout_shared_dim = 0.3, None


def balance_frames(module):
    module.feed_forward1.hidden_balancer.channel_dim, module.feed_forward1.hidden_balancer.num_channels = 0, FRAMES


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", [share_over_nothing, drop_behind_the_convolution, balance_frames])
def test_settings_that_nodes_were_not_written_for(change, grad):
    """In training mode, with gradients and without."""
    module = layer()
    for seed in range(4):
        both = []
        for ways in (MODULES, NODES):
            own = copy.deepcopy(module).train()
            change(own)
            seed_all(seed)
            x = torch.randn(FRAMES, BATCH, CHANNELS, dtype=torch.float64)
            position = torch.randn(1, 2 * FRAMES - 1, 8, dtype=torch.float64)
            with mock.patch.dict(WAYS, cpu=ways), use_backend("cpu"), torch.set_grad_enabled(grad):
                y = own(x, position)
                both.append(({"output": y.detach()}, generators()))
        assert_same(both[1][0], both[0][0])
        assert both[0][1] == both[1][1]


def rounded(dtype):
    return lambda: torch.autocast("cpu", dtype)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_under_autocast_nodes_are_as_near_to_float64_as_modules(training):
    """No dropout, for its masks are drawn in the dtype of what they multiply."""
    module = layer(dtype=torch.float32, dropout=0.0, batch_count=60_000.0)
    with mock.patch("random.random", return_value=1.0):
        exact, _ = run(MODULES, copy.deepcopy(module).double(), training=training)
        off = {}
        for ways in (MODULES, NODES):
            seed_all(0)
            got, _ = run(ways, copy.deepcopy(module), training=training, precision=rounded(torch.bfloat16))
            off[ways] = {name: error(got[name], exact[name]) for name in exact}
    assert off[NODES].keys() == off[MODULES].keys()
    for name, by_modules in off[MODULES].items():
        assert off[NODES][name] <= 1.5 * by_modules + 2e-3, name
    total = {ways: sum(errors.values()) for ways, errors in off.items()}
    assert total[NODES] < 1.1 * total[MODULES]


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-9)).item()


def test_gradients_of_gradients_are_those_of_modules():
    module = layer(batch_count=60_000.0)

    def second(ways):
        own = copy.deepcopy(module).eval()
        seed_all(3)
        x = torch.randn(FRAMES, BATCH, CHANNELS, dtype=torch.float64, requires_grad=True)
        position = torch.randn(1, 2 * FRAMES - 1, 8, dtype=torch.float64)
        parameters = [p for _, p in own.named_parameters()]
        with mock.patch.dict(WAYS, cpu=ways), use_backend("cpu"), mock.patch("random.random", return_value=1.0):
            y = own(x, position)
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), [x, *parameters], allow_unused=True)

    for mine, theirs in zip(second(NODES), second(MODULES), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_agrees(mine, theirs, 10 * PARITY[torch.float64])


def test_a_graph_that_is_kept_gives_the_same_bits_twice():
    module = layer().train()
    x = torch.randn(FRAMES, BATCH, CHANNELS, dtype=torch.float64, requires_grad=True)
    position = torch.randn(1, 2 * FRAMES - 1, 8, dtype=torch.float64)
    with mock.patch.dict(WAYS, cpu=NODES), use_backend("cpu"):
        y = module(x, position)
        parameters = [p for p in module.parameters() if p is not module.bypass_scale]
        parameters = [x, *(p for p in parameters if p.requires_grad)]
        once, again = (torch.autograd.grad(y.sum(), parameters, retain_graph=True, allow_unused=True) for _ in range(2))
    assert sum(one is not None for one in once) > 40
    for one, other in zip(once, again, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_gradient_is_handed_on_only_as_it_was_given():
    grad, low, sums = (torch.randn(3) for _ in range(3))
    handed = Handed()
    handed.give(grad, low, sums)
    assert handed.take(grad) == (low, sums)
    assert handed.take(grad) is None
    handed.give(grad, low, sums)
    assert handed.take(grad.clone()) is None
    handed.give(grad, low, sums)
    grad.add_(1)
    assert handed.take(grad) is None


def test_a_gradient_that_a_hook_changes_counts_as_changed():
    """A hook on the input of a module that is called, between two nodes."""

    class Halved(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, *args, **settings):
            y = self.inside(*args, **settings)
            y.register_hook(lambda grad: grad * 0.5)
            return y

    def wrap(module):
        module.self_attn1, module.feed_forward2 = Halved(module.self_attn1), Halved(module.feed_forward2)

    module = layer()
    expected, _ = run(MODULES, module, after=wrap)
    actual, _ = run(NODES, module, after=wrap)
    assert_same(actual, expected)


def test_nodes_save_as_little_as_modules():
    """Of so many frames that casts of weights hardly count. Nodes save 3.6% more."""
    module = layer(dtype=torch.float32, batch_count=60_000.0)

    def saved(ways):
        found = {}

        def pack(x):
            if not isinstance(x, nn.Parameter):  # which are there anyway
                storage = x.untyped_storage()
                found[storage.data_ptr()] = storage  # held, for memory that is given back is taken again
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(ways, module, precision=rounded(torch.bfloat16), frames=300)
        return sum(storage.nbytes() for storage in found.values())

    assert saved(NODES) <= 1.05 * saved(MODULES)


def test_a_layer_all_of_whose_products_are_called():
    """Under autocast, where there is nothing to cast: each branch has a forward of its own, norm and bypasses not."""
    module = layer(dtype=torch.float32, batch_count=60_000.0)

    def patch(module):
        for part in module.children():
            if hasattr(part, "in_proj"):
                part.forward = part.forward
        module.self_attn_weights.in_proj.forward = module.self_attn_weights.in_proj.forward
        module.self_attn_weights.linear_pos.forward = module.self_attn_weights.linear_pos.forward

    found = {}
    for ways in (MODULES, NODES):
        found[ways], _ = run(ways, module, after=patch, precision=rounded(torch.bfloat16))
    for name, wanted in found[MODULES].items():
        assert error(found[NODES][name], wanted.double()) < 1e-5, name


def test_casts_lie_side_by_side_and_aligned():
    """Those with whole groups of 16 bytes are aligned; the order and all shapes are kept."""
    shapes = ((3,), (8,), (17,), (5, 7), (0, 4), (4, 6), (2, 0), (16,))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    casts = cast(parameters, torch.bfloat16)
    for low, parameter in zip(casts, parameters, strict=True):
        assert torch.equal(low, parameter.bfloat16())
        assert not low.requires_grad
        assert low.shape == parameter.shape
        assert low.numel() % 8 or low.data_ptr() % 16 == 0
    assert len({x.untyped_storage().data_ptr() for x in casts if x.numel()}) == 1


def test_a_step_draws_the_same_from_torch_and_from_python():
    """Also where a branch is called as modules between nodes."""
    module = layer()

    def patch(module):
        module.conv_module1.forward = module.conv_module1.forward

    for seed in range(4):
        expected, state = run(MODULES, module, seed, after=patch)
        actual, same = run(NODES, module, seed, after=patch)
        assert_same(actual, expected)
        assert same == state
        assert random.getstate() is not None
