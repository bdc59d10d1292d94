"""A layer under what PyTorch puts around a model: autocast, checkpointing, torch.func and the like."""

import copy

import pytest
import torch
from draws import seed_all
from small_layer import (  # noqa: F401
    CHANNELS,
    all_lanes,
    assert_close,
    compiled_lanes,
    fixture_of_inputs,
    fixture_of_layer,
    on_lane,
    padding,
    run,
)
from tolerances import assert_agrees, rounding
from torch.utils.checkpoint import CheckpointError, checkpoint

from zipformer_kernels import swoosh_l
from zipformer_kernels.core import backend
from zipformer_kernels.core.backend import BackendError
from zipformer_kernels.modules import BiasNorm
from zipformer_kernels.training import Balancer, ScheduledFloat, checkpoint_contexts, without_draws

# ---- autocast ----


@compiled_lanes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(lane, dtype, layer, inputs):
    """As in float32 but for some roundings of the narrow dtype; parameters' gradients in float32."""
    layer.bypass.skip_rate = ScheduledFloat((0.0, 0.0))
    for feed_forward in (layer.feed_forward1, layer.feed_forward2, layer.feed_forward3):
        feed_forward.out_proj.dropout_p = 0.0  # drawn in the narrow dtype, for which torch before 2.8 has other numbers
    with without_draws():
        expected, draws = run(layer, layer, inputs)
        with torch.autocast("cpu", dtype):
            actual, our_draws = run(layer, layer, inputs)
    assert our_draws == draws
    assert all(value.dtype == torch.float32 for value in actual.values())
    difference = {name: (value - expected[name]).norm() for name, value in actual.items()}
    for name, value in expected.items():
        if value.norm() > 1e-2:
            assert difference[name] < rounding(dtype, 16) * value.norm(), name
    assert difference["output"] > 0


# ---- activation checkpointing ----


def checkpointed(layer, **options):
    def function(*args, **kwargs):
        return checkpoint(layer, *args, use_reentrant=False, **options, **kwargs)

    return function


@all_lanes
def test_checkpointing(lane, layer, inputs):
    """The second pass draws what the first one drew, and afterwards both generators are where they would be."""
    for seed in range(2 if lane == "triton" else 4):
        plain, again = copy.deepcopy(layer), copy.deepcopy(layer)
        expected, draws = run(plain, plain, inputs, seed)
        actual, our_draws = run(checkpointed(again, context_fn=checkpoint_contexts), again, inputs, seed)
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
        assert actual.keys() == expected.keys()
        assert our_draws == draws


def test_checkpointing_needs_the_contexts(layer, inputs):
    """What goes wrong without them, as it does upstream: another pass than the first, noticed or not."""
    wrong = 0
    for seed in range(4):
        plain, again = copy.deepcopy(layer), copy.deepcopy(layer)
        expected, _ = run(plain, plain, inputs, seed)
        try:
            actual, _ = run(checkpointed(again), again, inputs, seed)
        except CheckpointError:
            wrong += 1
        else:
            wrong += any(not torch.equal(actual[name], value) for name, value in expected.items())
    assert wrong > 0


# ---- autograd ----


@all_lanes
def test_backward_twice(lane, layer, inputs):
    x = inputs[0].clone().requires_grad_()
    seed_all(0)
    y = layer(x, inputs[1], src_key_padding_mask=padding(inputs[0]))
    grad = torch.randn_like(y)
    y.backward(grad, retain_graph=True)
    once = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    y.backward(grad)
    assert once
    for name, p in layer.named_parameters():
        assert name not in once or torch.equal(p.grad, 2 * once[name]), name


@all_lanes
def test_output_used_twice(lane, layer, inputs):
    """Its gradients add, and the gradient that arrives may be an expanded one."""
    layer.eval()
    with without_draws():
        grads = []
        for loss in (lambda y: y.sum() + y.square().sum(), lambda y: (y + y.square()).sum()):
            layer.zero_grad()
            loss(layer(*inputs, src_key_padding_mask=padding(inputs[0]))).backward()
            grads.append({name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None})
    assert_close(grads[0], grads[1])


def test_gradient_of_a_gradient(inputs):
    norm = BiasNorm(CHANNELS).double()
    x = inputs[0].double().requires_grad_()
    with without_draws():
        assert torch.autograd.gradgradcheck(norm, x)


@all_lanes
def test_deterministic_mode(lane, layer, inputs):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(twin := copy.deepcopy(layer), twin, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[0][name], value) for name, value in second[0].items())
    assert first[1] == second[1]


# ---- torch.func ----


def test_vmap_runs_the_reference(inputs):
    x = inputs[0]
    assert_agrees(torch.vmap(swoosh_l)(x), swoosh_l(x), rounding(x.dtype))


def test_gradients_of_each_sample(layer, inputs):
    """torch.func.grad within vmap, against one sample after the other."""
    norm = BiasNorm(CHANNELS).eval()
    parameters = dict(norm.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(norm, parameters, (x,)).square().mul(x).sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs[0])
    for i, x in enumerate(inputs[0]):
        norm.zero_grad()
        loss(parameters, x).backward()
        assert_close({name: value[i] for name, value in each.items()}, {n: p.grad for n, p in parameters.items()})


def test_torch_func_on_kernels_is_refused(inputs):
    with backend.use_backend("cpu"), pytest.raises(BackendError, match=r"swoosh: backend 'cpu' .* torch\.func"):
        torch.vmap(swoosh_l)(inputs[0])


def test_torch_func_of_training_is_refused(inputs):
    balancer = Balancer(CHANNELS, -1, prob=1.0)
    with pytest.raises(NotImplementedError, match=r"cannot be transformed by torch\.func .*without_draws"):
        torch.func.grad(lambda x: balancer(x).sum())(inputs[0])
