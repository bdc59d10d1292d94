"""What Zipformer needs in training only: schedules, balancers, whitening, dropout, limits on parameters."""

from zipformer_kernels.training.balancer import Balancer
from zipformer_kernels.training.dropout import Dropout2, Dropout3
from zipformer_kernels.training.gradients import (
    ScaleGrad,
    limit_param_value,
    penalize_abs_values_gt,
    scale_grad,
)
from zipformer_kernels.training.randomness import checkpoint_contexts, without_draws
from zipformer_kernels.training.schedule import FloatLike, PiecewiseLinear, ScheduledFloat
from zipformer_kernels.training.whiten import Whiten, whitening_schedule

__all__ = [
    "Balancer",
    "Dropout2",
    "Dropout3",
    "FloatLike",
    "PiecewiseLinear",
    "ScaleGrad",
    "ScheduledFloat",
    "Whiten",
    "checkpoint_contexts",
    "limit_param_value",
    "penalize_abs_values_gt",
    "scale_grad",
    "whitening_schedule",
    "without_draws",
]
