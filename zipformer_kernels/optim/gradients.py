"""The gradients of a group's parameters as the step takes them: dense, of their shapes, and this process's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from zipformer_kernels.core.call import unreadable
from zipformer_kernels.optim.memory import check_within
from zipformer_kernels.optim.packed import Packed, blocks
from zipformer_kernels.optim.shards import local, placed_like


def gradients(packed: Packed, names: list[str]) -> tuple[list[Tensor | None], set[torch.dtype], str | None]:
    """The gradients of a group.

    Returns:
        A gradient for each parameter, or None; the dtypes of those that have not their parameter's; and why kernels
        must not take the address of one, or None if they may take all.
    Raises:
        TypeError: a gradient is not dense, or of no floating dtype.
        ValueError: a gradient has not the shape or the device of its parameter, or no memory.
    """
    grads: list[Tensor | None] = []
    dtypes: set[torch.dtype] = set()
    reasons = []
    for block in blocks(len(packed.params)):
        found = [p.grad for p in packed.params[block]]
        odd = [
            i
            for i, (g, (dtype, shape, stride)) in enumerate(zip(found, packed.forms[block], strict=True))
            if g is not None and (g.dtype is not dtype or g.size() != shape or g.stride() != stride)
        ]
        reason = unreadable([packed.statistics.rms, *found])
        if odd or reason is not None:
            for i in odd if reason is None else range(len(found)):
                if found[i] is not None:
                    k = block.start + i
                    found[i] = _gradient(found[i], packed.params[k], packed.exp_avg_sq[k], names[k])
                    dtypes.add(found[i].dtype)
            reason = unreadable([packed.statistics.rms, *found])
        grads += found
        reasons.append(reason)
    return grads, dtypes, next((reason for reason in reasons if reason is not None), None)


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
