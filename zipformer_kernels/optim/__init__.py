"""The optimizer and the learning-rate schedules that Zipformer recipes train with."""

from zipformer_kernels.optim.checkpoint import load_upstream_state_dict, upstream_state_dict
from zipformer_kernels.optim.diagnostics import GroupDiagnostics, PendingDiagnostics
from zipformer_kernels.optim.eden import Eden, Eden2
from zipformer_kernels.optim.scaled_adam import ScaledAdam

__all__ = [
    "Eden",
    "Eden2",
    "GroupDiagnostics",
    "PendingDiagnostics",
    "ScaledAdam",
    "load_upstream_state_dict",
    "upstream_state_dict",
]
