"""The optimizer and the learning-rate schedules that Zipformer recipes train with."""

from torch.optim.lr_scheduler import LRScheduler  # icefall's train.py names it as the base of Eden

from zipformer_kernels.optim.averaging import average_model, update_averaged_model
from zipformer_kernels.optim.checkpoint import upstream_state_dict
from zipformer_kernels.optim.diagnostics import GroupDiagnostics, PendingDiagnostics
from zipformer_kernels.optim.eden import Eden, Eden2
from zipformer_kernels.optim.scaled_adam import ScaledAdam

__all__ = [
    "Eden",
    "Eden2",
    "GroupDiagnostics",
    "LRScheduler",
    "PendingDiagnostics",
    "ScaledAdam",
    "average_model",
    "update_averaged_model",
    "upstream_state_dict",
]
