"""Fused Triton, CUDA and CPU kernels for the Zipformer speech encoder, behind upstream's modules and arguments."""

from zipformer_kernels.backend import BackendError, use_backend
from zipformer_kernels.convert import convert, revert
from zipformer_kernels.modules.swoosh import SwooshL, SwooshR
from zipformer_kernels.ops import explain
from zipformer_kernels.ops.swoosh import swoosh_l, swoosh_r

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "SwooshL",
    "SwooshR",
    "convert",
    "explain",
    "revert",
    "swoosh_l",
    "swoosh_r",
    "use_backend",
]
