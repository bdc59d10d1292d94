"""A layer under torch.compile: one graph where nothing is drawn from Python's random, and what breaks it."""

import pytest
import torch
from draws import set_batch_count
from small_layer import (  # noqa: F401
    CHANNELS,
    assert_close,
    compiled_lanes,
    fixture_of_inputs,
    fixture_of_layer,
    on_lane,
    padding,
    run,
)
from tolerances import relative_error, rounding
from torch._dynamo.exc import Unsupported

from zipformer_kernels.optim import ScaledAdam
from zipformer_kernels.training import Balancer, Whiten, limit_param_value, without_draws


@compiled_lanes
def test_compile_in_eval(lane, layer, inputs):
    layer.eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = layer(*inputs, src_key_padding_mask=padding(inputs[0]))
        assert_close({"output": compiled(*inputs, src_key_padding_mask=padding(inputs[0]))}, {"output": expected})


@compiled_lanes
def test_compile_in_training(lane, layer, inputs):
    """With the dropouts and skips that torch's generator decides."""
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with without_draws():
        for seed in range(3):
            actual, expected = (run(f, layer, inputs, seed) for f in (compiled, layer))
            assert_close(actual[0], expected[0])
            assert actual[1] == expected[1]
    assert not torch.equal(expected[0]["output"], layer.eval()(*inputs, src_key_padding_mask=padding(inputs[0])))


@pytest.mark.parametrize("lane", ["cpu"])
def test_compile_by_inductor(lane, layer, inputs):
    set_batch_count(layer, None)  # no sequence is skipped: inductor has random numbers of its own
    for module in (layer.feed_forward1, layer.feed_forward2, layer.feed_forward3):
        module.out_proj.dropout_p = 0.0
    with without_draws():
        actual, expected = (run(f, layer, inputs)[0] for f in (torch.compile(layer, fullgraph=True), layer))
    assert_close(actual, expected)


def test_compile_with_autocast(layer, inputs):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with without_draws(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = (run(f, layer, inputs)[0] for f in (compiled, layer))
    assert actual["output"].dtype == expected["output"].dtype
    assert_close(actual, expected, rounding(torch.bfloat16))


def test_draws_break_the_graph(layer, inputs):
    """Outside of `without_draws`: one graph is impossible, several are not."""
    with pytest.raises(Unsupported, match=r"Random\.random"):
        torch.compile(layer, backend="eager", fullgraph=True)(*inputs)
    output = torch.compile(layer, backend="eager")(*inputs)
    output.sum().backward()
    assert output.isfinite().all()


CERTAIN = {
    "balancer": Balancer(CHANNELS, -1, min_positive=0.45, max_positive=0.55, min_abs=1.5, prob=1.0),
    "limit": lambda x: limit_param_value(x, -0.5, 0.5, prob=1.0),
}


@pytest.mark.parametrize("mechanism", CERTAIN.values(), ids=CERTAIN)
def test_what_is_certain_is_compiled(mechanism, inputs):
    grads = []
    for function in (mechanism, torch.compile(mechanism, backend="aot_eager", fullgraph=True)):
        x = inputs[0].clone().requires_grad_()
        function(x * 1.0).square().sum().neg().backward()
        grads.append({"x": x.grad})
    assert relative_error(grads[0]["x"], -2 * inputs[0]) > 1e-3
    assert_close(grads[1], grads[0])


def test_whitening_breaks_the_graph(inputs):
    """It looks at its metric to decide what to do, and how often to look again."""
    whiten = Whiten(1, 1.0, prob=1.0, grad_scale=0.1)
    x = inputs[0].clone().requires_grad_()
    with pytest.raises(Unsupported, match="tolist"):
        torch.compile(whiten, backend="eager", fullgraph=True)(x * 1.0)
    grads = []
    for function in (whiten, torch.compile(whiten, backend="eager")):
        x = inputs[0].clone().requires_grad_()
        function(x * 1.0).square().sum().backward()
        grads.append({"x": x.grad})
    assert_close(grads[1], grads[0])


def test_a_compiled_training_step_breaks_off_for_the_optimizer():
    """An optimizer's table of addresses cannot be recorded: it steps between two graphs, as torch's own do."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = ScaledAdam(model.parameters(), lr=0.01)

        def step(x, model=model, optimizer=optimizer):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step = torch.compile(step, backend="eager") if compiled else step
        x = torch.randn(4, 5)
        results.append(torch.stack([step(x) for _ in range(6)]))
    assert (results[0] - results[1]).abs().max() <= rounding(torch.float32, 100)
    assert results[0][-1] < results[0][0]
