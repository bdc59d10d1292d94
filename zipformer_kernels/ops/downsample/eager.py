"""The reference of downsample as a backend, which serves every call."""

from __future__ import annotations

from torch import Tensor

from zipformer_kernels.core.launch import as_empty_like, like
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.downsample.reference import backward, downsample, empty_results


def _forward(src: Tensor, bias: Tensor, mask: Tensor | None, channels: int) -> tuple[Tensor]:
    """Contiguous."""
    return (like(downsample(src, bias, mask, channels), *empty_results(src, bias, mask, channels)),)


def _backward(needs: tuple[bool, ...], grads: tuple[Tensor], saved: tuple[()], src: Tensor, *rest: object) -> tuple:
    dsrc, *others = backward(needs, grads, saved, src, *rest)
    return None if dsrc is None else as_empty_like(dsrc.contiguous(), src), *others


launchers = Launchers(lambda *_: None, _forward, _backward)
