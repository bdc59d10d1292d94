"""What is computed again in backward, part by part: the mechanism, and the conv embed's hidden channels with it."""

import pytest
import torch
import torch.nn.functional as F
import upstream
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_same_run, build_pair, seed_all, set_batch_count
from tolerances import PARITY, relative_error, rounding

from zipformer_kernels.library import gradient_hook, recomputed
from zipformer_kernels.modules import Conv2dSubsampling, ConvNeXt, subsampling
from zipformer_kernels.training.balancer import Moments


def layers(x, weight, bias, scale):
    hidden = F.linear(x, weight, bias)
    hidden = gradient_hook(hidden, lambda grad: 3 * grad)
    return torch.tanh(hidden) * scale


def arguments(rows=11, bias=True, dtype=torch.float64):
    tensors = (torch.randn(rows, 3), torch.randn(5, 3), torch.randn(5), torch.randn(5))
    x, weight, b, scale = (t.to(dtype).requires_grad_() for t in tensors)
    return [x, weight, b if bias else None, scale]


def gradients(y, args):
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, [arg for arg in args if arg is not None and arg.requires_grad], dy)


@pytest.mark.parametrize("part", [1, 2, 5, 10, 11, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_the_functions(part, bias):
    args = arguments(bias=bias)
    y, expected = recomputed(layers, part, *args), layers(*args)
    assert relative_error(y, expected) <= rounding(torch.float64)
    for grad, other in zip(gradients(y, args), gradients(expected, args), strict=True):
        assert relative_error(grad, other) <= rounding(torch.float64, 11)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 1, 2), (1, 2, 3), (0, 2)])
def test_frozen_arguments_get_no_gradient(frozen):
    args = arguments()
    for i in frozen:
        args[i].requires_grad_(False)
    y = recomputed(layers, 4, *args)
    y.sum().backward()
    assert [arg.grad is None for arg in args] == [i in frozen for i in range(4)]
    expected = torch.autograd.grad(layers(*args).sum(), [arg for arg in args if arg.requires_grad])
    for arg, grad in zip((arg for arg in args if arg.requires_grad), expected, strict=True):
        assert relative_error(arg.grad, grad) <= rounding(torch.float64, 11)


def test_expanded_gradients_and_strided_inputs():
    args = arguments()
    args[0] = torch.randn(3, 22, dtype=torch.float64).t()[::2].requires_grad_()
    y, expected = recomputed(layers, 4, *args), layers(*args)
    dy = torch.ones((), dtype=torch.float64).expand(y.shape)
    for grad, other in zip(torch.autograd.grad(y, args, dy), torch.autograd.grad(expected, args, dy), strict=True):
        assert relative_error(grad, other) <= rounding(torch.float64, 11)


def test_gradients_can_be_differentiated():
    def smooth(x, weight, bias, scale):
        return torch.tanh(F.linear(x, weight, bias)) * scale

    args = arguments()
    assert torch.autograd.gradcheck(lambda *args: recomputed(smooth, 4, *args), args)
    assert torch.autograd.gradgradcheck(lambda *args: recomputed(smooth, 4, *args), args)


def test_saves_its_arguments_only():
    args = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        recomputed(layers, 4, *args)
    assert [t.data_ptr() for t in saved] == [arg.data_ptr() for arg in args]


def test_changes_in_place_are_noticed():
    args = arguments()
    y = recomputed(layers, 4, *args)
    with torch.no_grad():
        args[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 2**31), st.sampled_from([0.0, 1e3, -1e5]))
def test_moments_of_parts_are_those_of_all(sizes, seed, offset):
    torch.manual_seed(seed)
    x = torch.randn(sum(sizes), 6, dtype=torch.float64) * torch.linspace(0.0, 3.0, 6, dtype=torch.float64) + offset
    moments = Moments()
    for part in x.split(sizes):
        moments.add(part)
    variance, mean = torch.var_mean(x, 0, correction=0)
    assert moments.rows == len(x)
    assert relative_error(moments.mean, mean) <= rounding(torch.float64, len(x))
    # x is rounded at the size of the offset, and so is each deviation
    allowed = rounding(torch.float64, len(x)) * (1 + abs(offset)) * max(1.0, variance.max().item())
    assert (moments.variance - variance).abs().max() <= allowed


def test_moments_of_half_precision_are_taken_in_float32():
    x = (torch.randn(300, 4) + 3).bfloat16()
    moments = Moments()
    for part in x.split(70):
        moments.add(part)
    variance, mean = torch.var_mean(x.double(), 0, correction=0)
    assert moments.mean.dtype == moments.variance.dtype == torch.float32
    assert relative_error(moments.mean, mean) <= rounding(torch.float32, 300)
    assert relative_error(moments.variance, variance) <= rounding(torch.float32, 300)


@pytest.fixture
def rows(monkeypatch):
    """So few rows at a time that short inputs need several parts."""
    monkeypatch.setattr(subsampling, "ROWS", 17)


def pair(**kwargs):
    their_class = upstream.subsampling.Conv2dSubsampling
    return build_pair(Conv2dSubsampling, their_class, 20, 12, 4, 8, 6, **kwargs)


def always_acting(model):
    """The balancer of the hidden channels, with a probability of 1 in place of its schedule."""
    balancer = model.convnext.hidden_balancer
    del balancer.prob
    balancer.prob = 1.0
    return balancer


@pytest.mark.parametrize("batch_count", [0, 5000, 30000])
def test_training_is_upstreams_in_any_number_of_parts(rows, batch_count):
    ours, theirs = pair(dropout=0.2)
    for model in (ours.train(), theirs.train()):
        set_batch_count(model, batch_count)
    for seed in range(6):
        args = [torch.randn(3, 40, 20, dtype=torch.float64), torch.tensor([40, 31, 25])]
        assert_same_run(ours, theirs, args, seed=seed)


@pytest.mark.parametrize("min_abs", [0.001, 0.75, 50.0])
@pytest.mark.parametrize("max_positive", [0.1, 0.5, 1.0])
def test_the_balancer_always_acting_is_upstreams(rows, min_abs, max_positive):
    ours, theirs = pair()
    for model in (ours, theirs):
        balancer = always_acting(model)
        balancer.min_abs, balancer.max_abs = min_abs, 2 * min_abs
        balancer.min_positive, balancer.max_positive = max_positive / 2, max_positive
    args = [torch.randn(2, 40, 20, dtype=torch.float64), torch.tensor([40, 31])]
    for seed in range(3):
        assert_same_run(ours.eval(), theirs.eval(), args, seed=seed)  # it acts in eval mode too


def test_frozen_first_layers_draw_as_upstreams(rows):
    """Without a gradient for the hidden channels the balancer is not asked."""
    for frozen in (("conv.", "convnext.depthwise", "convnext.pointwise_conv1"), ("convnext.pointwise_conv2",)):
        ours, theirs = pair()
        for model in (ours.train(), theirs.train()):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen))
        x, x_lens = torch.randn(2, 40, 20, dtype=torch.float64), torch.tensor([40, 31])
        for seed in range(4):
            results = []
            for model in (ours, theirs):
                seed_all(seed)
                model.zero_grad()
                y, _ = model(x, x_lens)
                with upstream.wide():
                    y.square().sum().backward()
                results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
            for mine, other in zip(*results, strict=True):
                assert relative_error(mine, other) <= PARITY[torch.float64]


def test_hooks_and_replaced_layers_are_called(rows):
    block = ConvNeXt(6).double()
    for replaced in (False, True):
        x = torch.randn(2, 6, 9, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        for name in ("pointwise_conv1", "hidden_balancer", "activation", "pointwise_conv2", "depthwise_conv"):
            module, calls = getattr(block, name), []
            if replaced:
                forward = module.forward
                module.forward = lambda *args, forward=forward, calls=calls: calls.append(args) or forward(*args)
            else:
                handle = module.register_forward_hook(lambda *args, calls=calls: calls.append(args))
            block(x.requires_grad_()).sum().backward()
            if replaced:
                del module.forward
            else:
                handle.remove()
            assert len(calls) == 1, name


def test_no_hidden_channels_are_stored():
    model = Conv2dSubsampling.from_preset("S").train()
    x, x_lens = torch.randn(1, 2007, 80), torch.tensor([2007])
    elements = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: elements.append(t.numel()) or t, lambda t: t):
        model(x, x_lens)
    assert max(elements) < 1000 * 19 * 384


def test_gradients_of_gradients_still_exist(rows):
    """As for a penalty on the gradient of the filterbank."""
    results = []
    for count in (17, 10**6):
        subsampling.ROWS = count
        seed_all(0)
        model = Conv2dSubsampling(20, 12, 4, 8, 6).double().eval()
        always_acting(model)
        x = torch.randn(2, 40, 20, dtype=torch.float64, requires_grad=True)
        y, _ = model(x, torch.tensor([40, 31]))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        results.append([dx.detach(), *(p.grad for p in model.parameters())])
    for part, whole in zip(*results, strict=True):
        assert (part is None) == (whole is None)
        if whole is not None:
            assert relative_error(part, whole) <= PARITY[torch.float64]
