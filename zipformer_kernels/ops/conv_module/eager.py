"""The reference of conv_module and of its variants as a backend, which serves every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from zipformer_kernels.core.autograd import backward_of
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.conv_module.reference import conv_module, infer, stream


def _forward(*args: object) -> tuple[Tensor]:
    return (conv_module(*args),)


def _dense(function: Callable[..., tuple[Tensor, ...]], *args: object) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in function(*args))


launchers = Launchers(
    lambda *_: None,
    _forward,
    backward_of(conv_module),
    variants={
        "infer": Launchers(lambda *_: None, partial(_dense, infer), None),
        "stream": Launchers(lambda *_: None, partial(_dense, stream), None),
    },
)
