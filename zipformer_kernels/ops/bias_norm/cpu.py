"""BiasNorm on the CPU: ``csrc/bias_norm/cpu.cpp``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import CPU_DTYPES, as_empty_like, call_cpu
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bias_norm.native import launchers_by
from zipformer_kernels.ops.bypass import cpu as mix

PARTS = tuning.entry("bias_norm.parts")
PART_ROWS = tuning.entry("bias_norm.part_rows")

_norm = launchers_by(call_cpu, CPU_DTYPES, lambda rows: rows.groups(shortest=PART_ROWS.value, most=PARTS.value))


def _bypass(x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One after the other."""
    y, inverse_rms = _norm.forward(x, bias, log_scale)
    (y,) = mix.launchers.forward(src_orig, y, scale)
    return as_empty_like(y.contiguous(), x), inverse_rms


def _bypass_backward(
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[Tensor],
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    src_orig: Tensor,
    scale: Tensor,
) -> tuple[Tensor | None, ...]:
    """The norm is computed again."""
    y, _ = _norm.forward(x, bias, log_scale)
    wanted = needs[3], any(needs[:3]), needs[4]
    dsrc_orig, dy, dscale = mix.launchers.backward(wanted, grads, (), src_orig, y, scale)
    of_norm = _norm.backward(needs[:3], (dy,), saved, x, bias, log_scale) if any(needs[:3]) else (None, None, None)
    return *of_norm, dsrc_orig, dscale


def _unsupported(x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor) -> str | None:
    return _norm.supports(x, bias, log_scale) or mix.launchers.supports(src_orig, src_orig, scale)


launchers = replace(_norm, variants={"bypass": Launchers(_unsupported, _bypass, _bypass_backward)})
