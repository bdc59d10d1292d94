"""BiasNorm in plain PyTorch: the specification every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from zipformer_kernels.ops.bypass.reference import bypass as mix


def bias_norm(x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
    """y = x exp(log_scale) / rms(x - bias) over the last dimension; half precision goes through float32."""
    y, _ = forward(x, bias, log_scale)
    return y


def forward(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """y, and 1 / rms(x - bias) for every row."""
    wide, wide_bias, gain = _widened(x, bias, log_scale)
    inverse_rms = ((wide - wide_bias) ** 2).mean(-1, keepdim=True) ** -0.5
    y = wide * (inverse_rms * gain)
    return y.to(result_dtype(x, bias)), inverse_rms.squeeze(-1)


def backward(
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[Tensor],
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, bias and log_scale, by the formulas in the package's docstring."""
    wide, wide_bias, gain = _widened(x, bias, log_scale)
    dy, r = grads[0].to(wide.dtype), saved[0].unsqueeze(-1)
    s = gain * r
    q = (dy * (wide * r)).sum(-1, keepdim=True)
    t = (wide - wide_bias) * r * (s * q / x.shape[-1])
    return (
        (s * dy - t).to(x.dtype) if needs[0] else None,
        t.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype) if needs[1] else None,
        (gain * q.sum()).to(log_scale.dtype) if needs[2] else None,
    )


def bypass(x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor) -> Tensor:
    """BiasNorm, and the bypass after it: src_orig + (bias_norm(x) - src_orig) scale."""
    return mix(src_orig, bias_norm(x, bias, log_scale), scale)


def bypass_forward(
    x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """What `bypass` returns, and 1 / rms(x - bias) for every row."""
    y, inverse_rms = forward(x, bias, log_scale)
    return mix(src_orig, y, scale), inverse_rms


def bypass_dtype(x: Tensor, bias: Tensor, src_orig: Tensor, scale: Tensor) -> torch.dtype:
    """The dtype of what `bypass` returns."""
    return torch.promote_types(result_dtype(x, bias), torch.promote_types(src_orig.dtype, scale.dtype))


def empty_bypass_results(
    x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Uninitialised tensors shaped as what `bypass_forward` returns."""
    _, inverse_rms = empty_results(x, bias, log_scale)
    return torch.empty_like(x, dtype=bypass_dtype(x, bias, src_orig, scale)), inverse_rms


def wide_dtype(x: Tensor, bias: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 if x or bias is."""
    return torch.promote_types(result_dtype(x, bias), torch.float32)


def result_dtype(x: Tensor, bias: Tensor) -> torch.dtype:
    """The dtype of the result."""
    return torch.promote_types(x.dtype, bias.dtype)


def empty_results(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised tensors shaped as what `forward` returns."""
    y = torch.empty_like(x, dtype=result_dtype(x, bias))
    return y, x.new_empty(x.shape[:-1], dtype=wide_dtype(x, bias))


def _widened(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, bias and exp(log_scale) in the dtype of the arithmetic."""
    dtype = wide_dtype(x, bias)
    return x.to(dtype), bias.to(dtype), log_scale.to(dtype).exp()
