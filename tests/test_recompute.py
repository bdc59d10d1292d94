"""What is computed again in backward, part by part: the mechanism, and the conv embed's hidden channels with it."""

import pytest
import torch
import torch.nn.functional as F
import upstream
from draws import seed_all, set_batch_count
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_same_run, build_pair
from tolerances import PARITY, relative_error, rounding

from zipformer_kernels.branch.recompute import pointwise_branch
from zipformer_kernels.core import tuning
from zipformer_kernels.modules import Conv2dSubsampling, ConvNeXt, convnext
from zipformer_kernels.training.balancer import Moments

BATCH, ROWS, KEPT = 3, 11, [True, False, True]
NAMES = ("src", "x", "weight1", "bias1", "weight2", "bias2")
ALLOWED = rounding(torch.float64, BATCH * ROWS)  # the longest sums are the parameters' gradients


class Tanh:
    """An activation that writes over all that it may."""

    def forward(self, hidden, bias):
        return hidden.add_(bias).tanh_()

    def backward(self, grad, hidden, bias):
        a = hidden.add_(bias).tanh_()
        return grad.mul_(1 - a.square()), a

    def reference(self, hidden):
        return torch.tanh(hidden)


def arguments(batch=BATCH, rows=ROWS):
    shapes = (batch, rows, 3), (batch, rows, 3), (5, 3), (5,), (3, 5), (3,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def branch(*args, part=4, kept=KEPT):
    return pointwise_branch(Tanh(), part, kept, *args)


def plain(src, x, weight1, bias1, weight2, bias2, kept=KEPT):
    added = F.linear(torch.tanh(F.linear(x, weight1, bias1)), weight2, bias2)
    return torch.where(torch.tensor(kept)[:, None, None], src + added, src)


def assert_same_gradients(y, expected, args, dy):
    wanted = torch.autograd.grad(expected, args, dy)
    for name, grad, other in zip(NAMES, torch.autograd.grad(y, args, dy), wanted, strict=False):
        assert relative_error(grad, other) <= ALLOWED, name


@pytest.mark.parametrize("part", [1, 2, 5, 10, 11, 100])
@pytest.mark.parametrize("kept", [[True] * 3, KEPT, [False, False, True], [False] * 3], ids=str)
def test_results_and_gradients_are_the_formulas(part, kept):
    args = arguments()
    y, expected = branch(*args, part=part, kept=kept), plain(*args, kept=kept)
    assert relative_error(y, expected) <= ALLOWED
    assert_same_gradients(y, expected, args, torch.randn_like(y))


def test_a_sequence_that_is_not_kept_is_src_and_touches_no_gradient():
    """Not even with what would spoil every sum."""
    args = arguments()
    with torch.no_grad():
        args[1][1] = torch.nan
    y = branch(*args)
    assert torch.equal(y[1], args[0][1])
    dy = torch.randn_like(y)
    dsrc, dx, *grads = torch.autograd.grad(y, args, dy)
    assert torch.equal(dsrc, dy)
    assert torch.equal(dx[1], torch.zeros_like(dx[1]))
    others = [args[0].detach()[::2], args[1].detach()[::2], *args[2:]]
    expected = torch.autograd.grad(branch(*others, kept=[True, True]), args[2:], dy[::2])
    assert all(map(torch.equal, grads, expected))


def test_no_rows_and_no_sequences():
    for batch, rows in ((0, 4), (2, 0)):
        args = arguments(batch, rows)
        y = branch(*args, kept=[True] * batch)
        assert y.shape == (batch, rows, 3)
        for arg, grad in zip(args, torch.autograd.grad(y.sum(), args), strict=True):
            assert torch.equal(grad, torch.zeros_like(arg))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 1), (1, 2, 3), (2, 3, 4, 5), (0, 1, 2, 4)])
def test_frozen_arguments_get_no_gradient(frozen):
    args = arguments()
    for i in frozen:
        args[i].requires_grad_(False)
    wanted = [arg for arg in args if arg.requires_grad]
    branch(*args).square().sum().backward()
    assert [arg.grad is None for arg in args] == [i in frozen for i in range(len(args))]
    for arg, grad in zip(wanted, torch.autograd.grad(plain(*args).square().sum(), wanted), strict=True):
        assert relative_error(arg.grad, grad) <= ALLOWED


def test_expanded_gradients_and_strided_inputs():
    args = arguments()
    for i in range(2):
        args[i] = torch.randn(3, 22, 3, dtype=torch.float64).transpose(0, 2)[:, ::2].requires_grad_()
    y = branch(*args)
    assert_same_gradients(y, plain(*args), args, torch.ones((), dtype=torch.float64).expand(y.shape))


@pytest.mark.parametrize("frozen", [(), (1, 2), (0, 3, 4, 5)])
def test_gradients_can_be_differentiated(frozen):
    args = arguments(rows=5)
    for i in frozen:
        args[i].requires_grad_(False)
    assert torch.autograd.gradcheck(branch, args)
    assert torch.autograd.gradgradcheck(branch, args)


def test_gradients_are_the_same_with_a_graph_of_them():
    args = arguments()
    y = branch(*args)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, args, dy, retain_graph=True)
    for grad, other in zip(grads, torch.autograd.grad(y, args, dy, create_graph=True), strict=True):
        assert relative_error(grad, other) <= ALLOWED


def test_saves_x_and_the_parameters_only():
    args, saved = arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        branch(*args)
    assert [t.data_ptr() for t in saved] == [arg.data_ptr() for arg in args[1:]]


@pytest.mark.parametrize("changed", [1, 2, 3, 4])
def test_changes_in_place_are_noticed(changed):
    args = arguments()
    y = branch(*args)
    with torch.no_grad():
        args[changed] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inputs_and_gradients_are_not_written_to():
    args = arguments()
    before = [arg.detach().clone() for arg in args]
    y = branch(*args)
    dy = torch.randn_like(y)
    given = dy.clone()
    torch.autograd.grad(y, args, dy)
    assert all(map(torch.equal, [*args, dy], [*before, given]))


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
def rows():
    """So few rows at a time that short inputs need several parts."""
    with tuning.override(**{"convnext.rows": 17}):
        yield


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


def test_training_is_upstreams_where_sequences_are_dropped(rows, monkeypatch):
    ours, theirs = pair(dropout=0.2)
    for model in (ours.train(), theirs.train()):
        del model.convnext.layerdrop_rate
        model.convnext.layerdrop_rate = 0.5
    drawn = []

    def watch(activation, part, kept, *tensors):
        drawn.append(tuple(kept))
        return pointwise_branch(activation, part, kept, *tensors)

    monkeypatch.setattr(convnext, "pointwise_branch", watch)
    for seed in range(6):
        args = [torch.randn(3, 40, 20, dtype=torch.float64), torch.tensor([40, 31, 25])]
        assert_same_run(ours, theirs, args, seed=seed)
    assert any(True in kept and False in kept for kept in drawn)


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


def test_gradients_of_gradients_still_exist():
    """As for a penalty on the gradient of the filterbank."""
    results = []
    for count in (17, 10**6):
        seed_all(0)
        model = Conv2dSubsampling(20, 12, 4, 8, 6).double().eval()
        always_acting(model)
        x = torch.randn(2, 40, 20, dtype=torch.float64, requires_grad=True)
        with tuning.override(**{"convnext.rows": count}):
            y, _ = model(x, torch.tensor([40, 31]))
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            dx.square().sum().backward()
        results.append([dx.detach(), *(p.grad for p in model.parameters())])
    for part, whole in zip(*results, strict=True):
        assert (part is None) == (whole is None)
        if whole is not None:
            assert relative_error(part, whole) <= PARITY[torch.float64]
