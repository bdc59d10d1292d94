"""Gradients that are to be differentiated are the same gradients, also where one input was computed from another."""

import pytest
import torch
from draws import seed_all
from lanes import lanes
from tolerances import PARITY, assert_agrees, rounding

from zipformer_kernels import ops, use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.modules import ZipformerEncoderLayer
from zipformer_kernels.ops.bias_norm import bias_norm
from zipformer_kernels.ops.bypass import bypass
from zipformer_kernels.training import without_draws

CALLS = {
    "bypass": lambda x: bypass(x, x.square(), x.flatten(0, 1).mean(0)),
    "bias_norm": lambda x: bias_norm(x, x.flatten(0, 1).mean(0), x.mean()),
}


@pytest.mark.parametrize(("name", "lane"), [(name, *p.values) for name in CALLS for p in lanes(ops.get(name))])
def test_inputs_that_depend_on_each_other(name, lane):
    x = torch.randn(3, 2, 8).to(lane.device).requires_grad_()
    with lane.active():
        y = CALLS[name](x).square().sum()
        (plain,) = torch.autograd.grad(y, x, retain_graph=True)
        (kept,) = torch.autograd.grad(y, x, create_graph=True)
    assert kept.requires_grad
    assert_agrees(kept.detach(), plain, rounding(torch.float32, 100))


@pytest.mark.parametrize("where", ["eager", "cpu"])
def test_a_whole_layer(where):
    if backend.missing[where]:
        pytest.skip(backend.missing[where])
    seed_all(0)
    layer = ZipformerEncoderLayer(16, 8, 4, 8, 4, 4, 24, cnn_module_kernel=7).double().eval()
    x, position = torch.randn(9, 2, 16).double().requires_grad_(), torch.randn(1, 17, 8).double()
    wanted = [x, *(p for p in layer.parameters() if p is not layer.bypass_scale)]
    with use_backend(where), without_draws():
        y = layer(x, position).square().sum()
        plain = torch.autograd.grad(y, wanted, retain_graph=True)
        kept = torch.autograd.grad(y, wanted, create_graph=True)
    size = max(grad.abs().max() for grad in plain)
    for one, other in zip(kept, plain, strict=True):
        assert (one - other).abs().max() <= 10 * PARITY[torch.float64] * size
