"""The gradients of a group's parameters as the step takes them: dense, of their shapes, and this process's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from zipformer_kernels.core.call import unreadable
from zipformer_kernels.optim.memory import check_within
from zipformer_kernels.optim.packed import Packed
from zipformer_kernels.optim.rows import Look
from zipformer_kernels.optim.shards import local, placed_like


def gradients(packed: Packed, names: list[str]) -> tuple[Look, set[torch.dtype], str | None]:
    """The gradients of a group.

    Returns:
        The gradients and where they and the parameters lie, none of them odd; the dtypes of those that were; and why
        kernels must not take the address of one, or None if they may take all, unless parameters forbid it.
    Raises:
        TypeError: a gradient is not dense, or of no floating dtype.
        ValueError: a gradient has not the shape or the device of its parameter, or no memory.
    """
    look = packed.take_look()
    dtypes: set[torch.dtype] = set()
    reason = None
    for i in look.odd:
        if look.grads[i] is not None:
            look.grads[i] = _gradient(look.grads[i], packed.params[i], packed.exp_avg_sq[i], names[i])
            dtypes.add(look.grads[i].dtype)
    if look.odd and packed.unreadable is None:
        reason = unreadable([packed.statistics.rms, *look.grads])
        for i in look.odd if reason is None else ():
            look.places[1, i] = look.grads[i].data_ptr()
    return look, dtypes, reason


def _gradient(g: Tensor, p: Tensor, v: Tensor, name: str) -> Tensor:
    """The gradient g of p, or this process's shard of it, laid out as v is."""
    if g.layout != torch.strided:
        raise TypeError(f"the gradient of {name!r} must be dense, got {g.layout}")
    if not g.is_floating_point():
        raise TypeError(f"the gradient of {name!r} must be a real floating-point tensor, got {g.dtype}")
    if g.shape not in (p.shape, v.shape):  # of the whole, or of this process's shard
        raise ValueError(f"the gradient of {name!r} must have shape {tuple(p.shape)}, got {tuple(g.shape)}")
    g = local(placed_like(g, p) if g.shape == p.shape else g)
    if g.device != v.device:
        raise ValueError(f"the gradient of {name!r} must be on {v.device}, got {g.device}")
    check_within(g, f"the gradient of {name!r}")
    if type(g) not in (Tensor, Parameter) or g.is_meta:
        return g
    if g._is_zerotensor() or g.is_neg() or (g.stride() != v.stride() and not (g.is_contiguous() and v.is_contiguous())):
        return torch.empty_like(v, dtype=g.dtype).copy_(g)
    return g
