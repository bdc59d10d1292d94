"""What a module may leave out when it only computes its result: no gradient, and nobody who looks on.

A module with a method ``add_to(src, ..., over)`` returns there src + module(src, ...). It writes over its own
intermediate results, with `over` also over src, and the sum is taken inside its last product, which starts from src in
place of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zipformer_kernels.call import watcher
from zipformer_kernels.launch import INFERENCE_DTYPES


def hooked(*modules: nn.Module) -> bool:
    """Whether any of the modules or of their children has forward hooks, which want to see it called."""
    for module in modules:  # asked for every module of every layer: loops and `_modules` take half the time
        if module._forward_hooks or module._forward_pre_hooks:
            return True
        for child in module._modules.values():
            if child._forward_hooks or child._forward_pre_hooks:
                return True
    return False


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is what `kind` makes of its attributes: no hooks, not quantized or replaced."""
    return type(module).forward is kind.forward and "forward" not in module.__dict__ and not hooked(module)


def only_computes(x: Tensor, parameter: Tensor) -> bool:
    """Whether a call on x, with parameters such as `parameter`, is plain inference on the CPU.

    Results are overwritten there only: elsewhere products and their sums are as fast apart. The kernels for it take
    no half precision.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != parameter.dtype:
        return False
    if x.dtype not in INFERENCE_DTYPES:
        return False
    return not torch.is_autocast_enabled("cpu") and watcher() is None


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
