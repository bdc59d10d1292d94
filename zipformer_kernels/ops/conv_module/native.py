"""conv_module through the compiled module: its arguments as the CPU's and CUDA's kernels take them."""

from __future__ import annotations

from typing import Any

from zipformer_kernels.core.launch import DTYPE_CODES, pointer
from zipformer_kernels.ops.conv_module.arguments import Arguments

INPUTS = "a", "s", "padding", "weight", "bias", "causal_weight", "causal_bias", "edge_scale"


def inputs(arguments: Arguments) -> dict[str, Any]:
    """`ConvModuleInputs` of ``csrc/conv_module/conv_module.h``."""
    tensors = arguments.a, arguments.s, arguments.padding, *arguments.parameters
    dtypes = {"x_dtype": DTYPE_CODES[arguments.a.dtype], "y_dtype": DTYPE_CODES[arguments.dtype]}
    return {**dict(zip(INPUTS, map(pointer, tensors), strict=True)), "shape": arguments.shape, **dtypes}
