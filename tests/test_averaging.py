"""Running averages of weights against upstream's rule, worked out by hand."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_agrees, rounding
from torch import nn

from zipformer_kernels.optim import average_model, update_averaged_model


class Tied(nn.Module):
    """Two parameters that share memory, a counter, and a floating-point buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)


def test_every_call_weighs_alike():
    torch.manual_seed(0)
    model = Tied()
    average = copy.deepcopy(model).double()
    seen = [copy.deepcopy(model.state_dict())]
    for calls in range(1, 6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model.norm.running_mean.normal_()
            model.norm.num_batches_tracked += 1
        # The first period counts twice, once for the weights at its start: as in upstream.
        update_averaged_model(SimpleNamespace(average_period=50, batch_idx_train=50 * (calls + 1)), model, average)
        seen.append(copy.deepcopy(model.state_dict()))
    for name, x in average.state_dict().items():
        if x.is_floating_point():
            mean = torch.stack([state[name].double() for state in seen]).mean(dim=0)
            torch.testing.assert_close(x, mean, rtol=1e-12, atol=1e-15)
        else:
            assert torch.equal(x, seen[0][name])
    assert average.first.weight is average.second.weight


def test_exponential_average():
    model, average = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.9 * average.weight.detach() + 0.1 * model.weight.detach()
    average_model(average, model, 0.1)
    assert_agrees(average.weight.detach(), expected, rounding(expected.dtype))
    average_model(average, model, 1.0)
    assert torch.equal(average.weight, model.weight)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"weight must be between 0 and 1, got 1\.5"):
        average_model(nn.Linear(2, 2), nn.Linear(2, 2), 1.5)
    with pytest.raises(ValueError, match="same entries, got bias in one only"):
        average_model(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)
