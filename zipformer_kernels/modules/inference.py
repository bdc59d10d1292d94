"""What a module may leave out when it only computes its result: no gradient, and nobody who looks on.

A module with a method ``add_to(src, ..., over)`` returns there src + module(src, ...), and leaves out the calls of its
parts: who calls it asks `zipformer_kernels.branch.plain` before. It writes over its own intermediate results, with
`over` also over src, and the sum is taken inside its last product, which starts from src in place of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.core.call import plain
from zipformer_kernels.core.launch import INFERENCE_DTYPES


def only_computes(x: Tensor, *others: Tensor) -> bool:
    """Whether a call on x, and on others that it reads itself, is inference on the CPU, on plain tensors of one dtype.

    Results are overwritten there only: elsewhere products and their sums are as fast apart. The kernels for it take
    no half precision.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in INFERENCE_DTYPES:
        return False
    if any(other.dtype != x.dtype for other in others):
        return False
    return not torch.is_autocast_enabled("cpu") and plain(x, *others)


def add_product(src: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, over: bool) -> Tensor:
    """src + x W^T + b, in a new tensor or in that of src.

    Args:
        src: (..., out_channels).
        x: (..., in_channels), of as many rows.
        weight: (out_channels, in_channels).
        bias: (out_channels,), or None.
        over: whether the result may replace src.
    """
    if over and src.is_contiguous():
        out = src if bias is None else src.add_(bias)
    else:
        out = src.clone(memory_format=torch.contiguous_format) if bias is None else torch.add(src, bias).contiguous()
    out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return out
