"""Kernels read memory: only of plain tensors, and only where nobody wants to see the calls that they replace."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from zipformer_kernels.core.call import LOWEST, plain, unreadable, watcher


class Tagged(Tensor):
    """A subclass that adds nothing: what fastai and others make of tensors."""


class Scaled(Tensor):
    """A subclass that holds its numbers in another form, as quantized and distributed tensors do."""

    @staticmethod
    def __new__(cls, whole: Tensor, scale: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, device=whole.device)

    def __init__(self, whole: Tensor, scale: Tensor) -> None:
        self.whole, self.scale = whole, scale

    @classmethod
    def of(cls, x: Tensor) -> "Scaled":
        scale = x.detach().abs().amax() / 127 + 1e-6
        return cls((x.detach() / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        given = torch.utils._pytree.tree_map(
            lambda x: x.whole.to(x.scale.dtype) * x.scale if isinstance(x, Scaled) else x, (args, kwargs or {})
        )
        return function(*given[0], **given[1])


def freed(x: Tensor) -> Tensor:
    """Part of a tensor whose memory was given back, as FSDP does with weights between their uses."""
    base = torch.cat([x.flatten(), x.flatten()])
    part = base[x.numel() :].view(x.shape)
    base.untyped_storage().resize_(0)
    return part


UNPLAIN = {
    "subclass": lambda x: x.as_subclass(Tagged),
    "wrapper": Scaled.of,
    "parameter of a wrapper": lambda x: nn.Parameter(Scaled.of(x), requires_grad=False),
    "sparse": lambda x: x.to_sparse(),
    "compressed rows": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "meta": lambda x: x.to("meta"),
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
    "functional": torch._to_functional_tensor,
    "freed": freed,
    "fake": lambda x: FakeTensorMode().from_tensor(x),
}


@contextlib.contextmanager
def tangents():
    with forward_ad.dual_level():
        yield


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


MODES = {
    "dispatch": Sees,
    "function": SeesFunctions,
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "flops": lambda: FlopCounterMode(display=False),
    "tangents": tangents,
}


@pytest.mark.parametrize("kind", UNPLAIN)
def test_what_is_not_plain_is_told(kind):
    x, odd = torch.randn(3, 4), UNPLAIN[kind](torch.randn(3, 4))
    assert not plain(x, None, odd)
    assert "plain tensors" in unreadable([x, odd])


@pytest.mark.parametrize("mode", MODES)
def test_modes_look_on(mode):
    with MODES[mode]():
        assert watcher() in ("mode", "tangents")
        assert not plain(torch.ones(2))
    assert plain(torch.ones(2))


def test_plain():
    x = torch.randn(6, 4)
    parts = x[::2], x.t(), x.expand(2, 6, 4), x[:0], torch.empty(0), nn.Parameter(x), x.bfloat16(), x > 0, nn.Buffer(x)
    assert plain(x, None, *parts)
    assert plain()
    with torch.inference_mode():
        assert plain(torch.ones(2), x)
    with torch.device("cpu"):  # a TorchFunctionMode that only makes tensors
        assert plain(x)
    assert x.data_ptr() > LOWEST


def test_memory_at_low_addresses_is_looked_into(monkeypatch):
    monkeypatch.setattr("zipformer_kernels.core.call.LOWEST", 1 << 64)
    assert plain(torch.ones(3), torch.ones(6)[2:])
    assert not plain(freed(torch.ones(3)))
