"""What a recipe's files import from upstream's ``scaling.py``, under its names: this module can stand in for that one.

    from zipformer_kernels.scaling import Balancer, ScaledLinear, ScheduledFloat, SwooshR

or, for files that stay as they are::

    sys.modules["scaling"] = zipformer_kernels.scaling

Source: ``scaling.py`` of icefall's ``egs/librispeech/ASR/zipformer``, and of the package ``zipformer``.
"""

from typing import Optional  # noqa: F401  (icefall's subsampling.py imports it from here)

from torch import nn

from zipformer_kernels.modules import (
    ActivationDropoutAndLinear,
    BiasNorm,
    ChunkCausalDepthwiseConv1d,
    ScaledConv2d,
    ScaledLinear,
    SwooshL,
    SwooshR,
)
from zipformer_kernels.modules.encoder import convert_num_channels
from zipformer_kernels.ops.attention.dense import softmax
from zipformer_kernels.training import (
    Balancer,
    Dropout2,
    Dropout3,
    FloatLike,
    PiecewiseLinear,
    ScaleGrad,
    ScheduledFloat,
    Whiten,
    limit_param_value,
    penalize_abs_values_gt,
)

Identity = nn.Identity  # upstream has its own because backward hooks once misbehaved on torch's
SwooshLOnnx, SwooshROnnx = SwooshL, SwooshR  # which ONNX exporters take as they are

__all__ = [
    "ActivationDropoutAndLinear",
    "Balancer",
    "BiasNorm",
    "ChunkCausalDepthwiseConv1d",
    "Dropout2",
    "Dropout3",
    "FloatLike",
    "Identity",
    "PiecewiseLinear",
    "ScaleGrad",
    "ScaledConv2d",
    "ScaledLinear",
    "ScheduledFloat",
    "SwooshL",
    "SwooshLOnnx",
    "SwooshR",
    "SwooshROnnx",
    "Whiten",
    "convert_num_channels",
    "limit_param_value",
    "penalize_abs_values_gt",
    "softmax",
]
