"""Our encoder passes for the ``EncoderInterface`` that an icefall recipe's ``model.py`` asks for."""

import copy
import pickle
import sys

import pytest
import torch
import upstream
from test_encoder_upstream import CONFIG
from torch import nn

from zipformer_kernels import Zipformer, Zipformer2, convert

INTERFACE = """
from torch import nn

class EncoderInterface(nn.Module):
    def forward(self, x, x_lens):
        raise NotImplementedError
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The folder of a recipe, from which its files are imported; afterwards all is as it was."""
    bases = Zipformer.__bases__
    (tmp_path / "encoder_interface.py").write_text(INTERFACE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    Zipformer.__bases__ = bases
    sys.modules.pop("encoder_interface", None)


def test_an_encoder_is_an_instance(recipe):
    before = Zipformer2(**CONFIG).eval()  # the recipe's model may be imported later
    from encoder_interface import EncoderInterface

    assert isinstance(before, EncoderInterface)
    encoder = Zipformer2(**CONFIG)
    for made in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert isinstance(made, EncoderInterface)
        assert isinstance(made, nn.Module)
        assert type(made) is Zipformer
    x, lengths = torch.randn(9, 1, CONFIG["encoder_dim"][0]), torch.tensor([9])
    y, _ = before(x, lengths)
    assert y.shape == (5, 1, max(CONFIG["encoder_dim"]))


def test_a_converted_encoder_is_an_instance(recipe):
    encoder = upstream.zipformer.Zipformer(**CONFIG)
    convert(encoder)
    from encoder_interface import EncoderInterface

    assert type(encoder) is Zipformer
    assert isinstance(encoder, EncoderInterface)


def test_a_subclass_may_name_the_interface_itself(recipe):
    from encoder_interface import EncoderInterface

    class First(EncoderInterface, Zipformer):
        pass

    class Last(Zipformer, EncoderInterface):
        pass

    Zipformer(**CONFIG)
    assert isinstance(First(**CONFIG), EncoderInterface)
    assert isinstance(Last(**CONFIG), EncoderInterface)


def test_without_a_recipe_nothing_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "encoder_interface", None)  # as where it cannot be imported
    bases = Zipformer.__bases__
    Zipformer(**CONFIG)
    assert Zipformer.__bases__ == bases
