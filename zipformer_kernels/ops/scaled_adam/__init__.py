"""One ScaledAdam step over lists of tensors, in place; the mathematics and the state are in `reference`."""

from zipformer_kernels.ops.scaled_adam.reference import EARLY_ESTIMATES, Group, Hyper, Statistics, step

__all__ = ["EARLY_ESTIMATES", "Group", "Hyper", "Statistics", "step"]
