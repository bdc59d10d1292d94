"""torch.jit.script: refused at once by every module of ours, with a way out that works."""

import pytest
import torch
import upstream
from draws import seed_all
from tolerances import PARITY, assert_parity
from torch import nn

from zipformer_kernels import Zipformer, convert, modules, revert, training
from zipformer_kernels.core.module import Module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def public_classes():
    found = {value for room in (modules, training) for value in vars(room).values() if isinstance(value, type)}
    return sorted((value for value in {*found, Zipformer} if issubclass(value, nn.Module)), key=lambda c: c.__name__)


@pytest.mark.parametrize("kind", public_classes(), ids=lambda kind: kind.__name__)
def test_every_module_refuses(kind):
    assert issubclass(kind, Module)
    with pytest.raises(NotImplementedError, match=rf"cannot compile {kind.__name__}\. .*revert\(model\)"):
        torch.jit.script(kind.__new__(kind))


class Recipe(nn.Module):
    """What is not ours around an encoder."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor, x_lens: torch.Tensor):
        return self.encoder(x, x_lens)


def test_a_converted_model_is_scripted_when_reverted():
    seed_all(0)
    encoder = upstream.zipformer.Zipformer(
        downsampling_factor=(2,), encoder_dim=8, encoder_unmasked_dim=8, num_encoder_layers=1, num_heads=2, causal=True
    )
    model = Recipe(encoder).eval()
    convert(model)
    with pytest.raises(NotImplementedError, match="revert"):
        torch.jit.script(model)
    args = torch.randn(11, 2, 8), torch.tensor([11, 7])
    with torch.no_grad():
        expected, lengths = model(*args)
        revert(model)
        actual, actual_lengths = torch.jit.script(model)(*args)
    assert_parity(actual, expected, PARITY[torch.float32], "output")
    assert torch.equal(actual_lengths, lengths)
