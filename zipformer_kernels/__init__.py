"""Fused Triton, CUDA and CPU kernels for the Zipformer speech encoder, behind upstream's modules and arguments."""

from zipformer_kernels.checkpoint import load_checkpoint, load_encoder
from zipformer_kernels.convert import convert, revert
from zipformer_kernels.core.backend import BackendError, use_backend
from zipformer_kernels.graphs import CaptureError, GraphedStep, graphed
from zipformer_kernels.modules import *  # noqa: F403
from zipformer_kernels.modules import __all__ as _modules
from zipformer_kernels.modules.encoder import Zipformer, Zipformer2
from zipformer_kernels.ops import explain
from zipformer_kernels.ops.attention import AttentionWeights, ChunkMask, rel_pos_attention
from zipformer_kernels.ops.bias_norm import bias_norm
from zipformer_kernels.ops.nonlin_attention import nonlin_attention
from zipformer_kernels.ops.swoosh import swoosh_l, swoosh_r
from zipformer_kernels.ops.swoosh_linear import swoosh_linear
from zipformer_kernels.optim import Eden, Eden2, ScaledAdam
from zipformer_kernels.scaling import *  # noqa: F403
from zipformer_kernels.scaling import __all__ as _scaling

__version__ = "0.2.0"

__all__ = [
    "AttentionWeights",
    "BackendError",
    "CaptureError",
    "ChunkMask",
    "Eden",
    "Eden2",
    "GraphedStep",
    "ScaledAdam",
    "Zipformer",
    "Zipformer2",
    "bias_norm",
    "convert",
    "explain",
    "graphed",
    "load_checkpoint",
    "load_encoder",
    "nonlin_attention",
    "rel_pos_attention",
    "revert",
    "swoosh_l",
    "swoosh_linear",
    "swoosh_r",
    "use_backend",
    *sorted({*_modules, *_scaling}),
]
