"""conv_module through the compiled module: what the CPU's and CUDA's launchers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.launch import DTYPE_CODES, pointer
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.conv_module.arguments import Arguments, Gradients

PART_FRAMES = tuning.entry("conv_module.part_frames")


def _forward(call: Callable[..., None], *args: Any) -> tuple[Tensor]:
    arguments = Arguments(*args)
    y = arguments.result()
    if y.numel() > 0:
        call("conv_module_forward", y, **_inputs(arguments), y=pointer(y))
    return (y,)


def _backward(
    call: Callable[..., None],
    most_parts: Callable[[Arguments], int],
    beside: bool,
    needs: tuple[bool, ...],
    grads: tuple[Tensor],
    saved: tuple[()],
    *args: Any,
) -> tuple[Tensor | None, ...]:
    arguments = Arguments(*args)
    dy = grads[0].contiguous()
    out = Gradients(arguments, needs, arguments.parts(PART_FRAMES.value, most_parts(arguments)), beside)
    if dy.numel() > 0:
        call(
            "conv_module_backward",
            dy,
            **_inputs(arguments),
            dy=pointer(dy),
            da=pointer(out.da),
            ds=pointer(out.ds),
            partials=pointer(out.partials),
            parts=out.parts,
            gradient_step=out.step,
        )
    return out.returned()


INPUTS = "a", "s", "padding", "weight", "bias", "causal_weight", "causal_bias", "edge_scale"


def _inputs(arguments: Arguments) -> dict[str, Any]:
    """`ConvModuleInputs` of ``csrc/conv_module/conv_module.h``."""
    tensors = arguments.a, arguments.s, arguments.padding, *arguments.parameters
    dtypes = {"x_dtype": DTYPE_CODES[arguments.a.dtype], "y_dtype": DTYPE_CODES[arguments.dtype]}
    return {**dict(zip(INPUTS, map(pointer, tensors), strict=True)), "shape": arguments.shape, **dtypes}


def launchers_by(
    call: Callable[..., None],
    supports: Callable[..., str | None],
    most_parts: Callable[[Arguments], int],
    beside: bool,
) -> Launchers:
    """The launchers whose kernels `call` calls.

    Args:
        call: calls a function of the compiled module.
        supports: as of `Launchers`.
        most_parts: into how many groups of frames at most, whose gradients of parameters are summed apart.
        beside: whether the kernel can write da and ds side by side where a and s lie so.
    """
    return Launchers(supports, partial(_forward, call), partial(_backward, call, most_parts, beside))
