"""ScaledAdam's step in plain PyTorch: the specification of every backend, and the eager backend.

One step of one group of N tensors, with t the number of steps applied before it, p, g, v, m a tensor, its
gradient, its second moment and its momentum, n its element count; P = ``size_update_period``,
L = ``clipping_update_period``, (b1, b2) = ``betas``, s = ``scalar_lr_scale``. "Single" tensors have exactly
one element, in whatever shape.

Pass 1, over p and g (`tensor_sums`): for each tensor ::

    sum p^2,  sum p g,  sum g^2          a missing gradient counts as zeros

Pass 2, over numbers per tensor (`measure`, `plan_step`), everything on the device. With a loss scale K,
gradients are g / K in every formula::

    norm = sqrt( sum over tensors of w^2 sum g^2 ),   w = s for a single tensor, else rms
    ok   = the norms of all groups of the step are finite, and nobody reported an overflow
    if not ok: count the step in `skipped` and change nothing else, as if the batch had never been

    c = 1
    if clipping, and t > 0:
        norms[t mod L] = norm
        if t < L and t in {10, 20, 40}:
            threshold = 2 clipping_scale sorted(norms)[L - t + min(t - 1, 2 (t div 4))]
        else if t mod L = 0:
            threshold = clipping_scale sorted(norms)[min(L - 1, 2 (L div 4))]
        where the threshold has just been set: clipped = 0
        c = min(1, threshold / (norm + 1e-20))           infinite until set, so that c = 1
        clipped += (c < 1)

    scale_grads[t mod P] = c sum p g
    move = 0
    if t mod P = P - 1:
        rms = sqrt(sum p^2 / n)                          of p before its update
        if t > 0, for tensors that are not single:
            u    = b2^P u + (1 - b2^P) mean over P of scale_grads^2
            move = -lr s sqrt(1 - b2^(P ((t + 1) div P))) (sum over P of scale_grads) / (sqrt(u) + eps)
            move = 0 where rms < param_min_rms
            move = min( clamp(move, -0.1, 0.1), (param_max_rms - rms) / rms )

    a = -lr s for a single tensor, else -lr max(rms, param_min_rms), with the rms just refreshed
    k = 1 / (1 - b2^(t + 1)) while 1 - b2^(t + 1) < 0.99, then 1
    t = t + 1

Pass 3, over p, g, v, m (`update`): for each element, given c, k of the group and a, move of the tensor ::

    g = c g
    v = b2 v + (1 - b2) g^2
    d = a g / (sqrt(k v) + eps) + move p
    m = b1 m + (1 - b1) d                                              not corrected for its start at zero
    p = p + m
    p = clamp(p, -scalar_max, scalar_max) for single tensors

State. v and m have the shape of p, in float32, or float64 where p is float64; half-precision p is widened,
updated and rounded once. v, m, u and scale_grads start at zero, rms at that of the first p. `Statistics`
holds all but v and m: for each tensor rms, u and P numbers of scale_grads, packed with the tensors along the
last axis, so that a kernel reads them by tensor index; for the group t, the norms, the threshold and two
counts. t lives on the device because a skipped step must not advance it, and each replay of a captured CUDA
graph must.

Between pass 1 and pass 2 stands the only quantity that needs other machines: where tensors are sharded, the
(3, N) sums of every group are what is added up over shards.

Source: ``ScaledAdam`` in upstream's ``optim.py``, which differs from appendix A of the Zipformer paper
(arXiv:2310.11230). Two things differ from upstream on purpose: a norm that is not finite leaves everything
untouched (upstream lets NaN through, and takes an infinite norm for a batch of zero gradients), and nothing
waits for the device. Upstream also keeps float32 state for float64 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

EARLY_ESTIMATES = (10, 20, 40)  # steps at which the clipping threshold is set before the first full period
EARLY_SLACK = 2.0  # factor on the threshold at those steps, while the norms still change fast
MAX_SCALE_MOVE = 0.1  # largest relative change of a tensor's scale at one update of its size
CORRECTED_BELOW = 0.99  # the second moment is corrected for its start at zero while 1 - b2^t is below this


@dataclass(frozen=True)
class Hyper:
    """What the user may change from step to step; see `zipformer_kernels.optim.ScaledAdam` for each.

    `lr` may be a tensor of one element on the group's device, so that a captured graph follows its changes.
    """

    lr: float | Tensor
    clipping_scale: float | None
    betas: tuple[float, float]
    scalar_lr_scale: float
    eps: float
    param_min_rms: float
    param_max_rms: float
    scalar_max: float


@dataclass
class Statistics:
    """The small state of one group, all on its device; floating-point numbers in float32, or float64 if any
    parameter is float64.

    Attributes:
        step: () int64, steps applied.
        skipped: () int64, steps skipped for a non-finite gradient norm.
        clipped: () int64, steps clipped since the threshold was last set.
        norms: (clipping_update_period,), the gradient norm of step t at t mod clipping_update_period.
        threshold: (), the norm above which gradients are scaled down; infinite until first set.
        rms: (N,), root mean square of each tensor when last measured.
        scale_exp_avg_sq: (N,), second moment of the gradient with respect to the log of each tensor's scale.
        scale_grads: (size_update_period, N), the last gradients with respect to that log.
        numel: (N,), elements of each tensor (at least 1, so that empty tensors give 0 and not NaN).
        single: (N,) bool, tensors of exactly one element.
        contributions: (N,), what each tensor added to the square of the last norm. Not part of a checkpoint.
    """

    step: Tensor
    skipped: Tensor
    clipped: Tensor
    norms: Tensor
    threshold: Tensor
    rms: Tensor
    scale_exp_avg_sq: Tensor
    scale_grads: Tensor
    numel: Tensor
    single: Tensor
    contributions: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.contributions = torch.zeros_like(self.rms)


@dataclass
class Group:
    """One group of tensors: lists of equal length, all on one device.

    `exp_avg_sq` and `delta` are v and m, in the shape of p, in float32, or float64 where p is float64; they have its
    strides, or lie contiguous where its elements have gaps. All three keep their dtypes, shapes and strides, and v and
    m their places, as long as `statistics` is the same object. A gradient is None where it is missing, or has the shape
    of p, the strides of v, and any floating dtype. Of a tensor that is spread over processes these are this process's
    shards; `single` speaks of whole tensors.

    `dtypes` are those of parameters and gradients; `unreadable` says why kernels must not take the address of a tensor,
    and is None where they may take all. `places`, (2, N) int64, are the addresses of parameters and of gradients,
    0 for a missing one, where the caller has them already.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    exp_avg_sq: list[Tensor]
    delta: list[Tensor]
    single: list[bool]
    statistics: Statistics
    hyper: Hyper
    dtypes: Set[torch.dtype]
    unreadable: str | None = None
    places: np.ndarray | None = None


@dataclass
class Plan:
    """What pass 3 needs to know: numbers of the group, () each, and of its tensors, (N,) each.

    Attributes:
        ok: () bool; if False, pass 3 changes nothing, and the other fields hold harmless zeros.
        grad_scale: (), c / K, the factor on gradients.
        variance_scale: (), k, the factor on v under the root.
        step_size: (N,), a.
        scale_move: (N,), move.
    """

    ok: Tensor
    grad_scale: Tensor
    variance_scale: Tensor
    step_size: Tensor
    scale_move: Tensor


@torch.no_grad()
def step(
    groups: Sequence[Group],
    loss_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    reduce: Callable[[Tensor], None] | None = None,
    *,
    chunk_elements: int,
) -> None:
    """One optimizer step: updates parameters, moments and statistics of all groups in place, or of none.

    Args:
        groups: the groups with at least one tensor.
        loss_scale: () K, by which all gradients are too large.
        found_inf: () positive where somebody already knows that a gradient is not finite.
        reduce: adds the sums of other processes, in place, to the (3, N) sums over the tensors of all groups.
        chunk_elements: elements updated at a time: bounds the temporaries.
    """
    all_sums = [tensor_sums(group.params, group.grads, group.statistics.rms.dtype) for group in groups]
    if reduce is not None:
        packed = torch.cat(all_sums, dim=1)
        reduce(packed)
        all_sums = packed.split([len(group.params) for group in groups], dim=1)
    norms = [
        measure(sums, group.statistics, group.hyper.scalar_lr_scale, loss_scale)
        for sums, group in zip(all_sums, groups, strict=True)
    ]
    ok = _all_finite(norms, found_inf)
    for group, sums, norm in zip(groups, all_sums, norms, strict=True):
        plan = plan_step(sums, norm, ok.to(norm.device), group.statistics, group.hyper, loss_scale)
        update(group, plan, chunk_elements)


def tensor_sums(params: Sequence[Tensor], grads: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Pass 1: (3, N) sums of p^2, p g and g^2 over each tensor, in `dtype`."""
    sums = []
    for p, g in zip(params, grads, strict=True):
        p = p.to(dtype)
        g = p.new_zeros(()) if g is None else g.to(dtype)
        # Sums of products cascade; dot products and norms add up in one float32 a lane, a hundred times less
        # exact.
        sums.append(torch.stack([(p * p).sum(), (p * g).sum(), (g * g).sum()]))
    return torch.stack(sums, dim=1)


def measure(sums: Tensor, state: Statistics, scalar_lr_scale: float, loss_scale: Tensor | None) -> Tensor:
    """First half of pass 2: the group's gradient norm, (), weighted by each tensor's rms."""
    _, _, squares = sums.unbind()
    weight = torch.where(state.single, scalar_lr_scale, state.rms)
    state.contributions.copy_(weight.square() * squares * _inverse(loss_scale, sums).square())
    return state.contributions.sum().sqrt()


def plan_step(
    sums: Tensor, norm: Tensor, ok: Tensor, state: Statistics, hyper: Hyper, loss_scale: Tensor | None
) -> Plan:
    """Second half of pass 2: advances the statistics, and returns the numbers that the update needs.

    Args:
        sums: (3, N) from `tensor_sums`.
        norm: () from `measure`.
        ok: () bool, whether the step is to be taken.
    """
    t = state.step
    squares, products, _ = sums.unbind()
    period = state.scale_grads.shape[0]
    beta2 = hyper.betas[1]
    clip = torch.ones_like(norm) if hyper.clipping_scale is None else _clip(norm, ok, state, hyper.clipping_scale)
    grad_scale = clip * _inverse(loss_scale, norm)

    refresh = ok & (t % period == period - 1)
    slots = torch.arange(period, device=t.device).unsqueeze(1)
    _assign(state.scale_grads, products * grad_scale, ok & (slots == t % period))
    _assign(state.rms, (squares / state.numel).sqrt(), refresh)

    move_due = refresh & (t > 0)
    decay = beta2**period
    square = state.scale_grads.square().mean(dim=0)
    _assign(state.scale_exp_avg_sq, decay * state.scale_exp_avg_sq + (1 - decay) * square, move_due)
    correction = _one_minus_power(decay, (t + 1) // period, norm).sqrt()
    denominator = state.scale_exp_avg_sq.sqrt() + hyper.eps
    move = -hyper.lr * hyper.scalar_lr_scale * correction * state.scale_grads.sum(dim=0) / denominator
    move = move.masked_fill(state.rms < hyper.param_min_rms, 0.0).clamp(-MAX_SCALE_MOVE, MAX_SCALE_MOVE)
    move = torch.minimum(move, (hyper.param_max_rms - state.rms) / state.rms)
    move = move.masked_fill(~move_due | state.single, 0.0)

    size = torch.where(state.single, hyper.scalar_lr_scale, state.rms.clamp(min=hyper.param_min_rms))
    bias = _one_minus_power(beta2, t + 1, norm)
    variance_scale = torch.where(bias < CORRECTED_BELOW, 1.0 / bias, 1.0)

    state.step.add_(ok)
    state.skipped.add_(~ok)
    return Plan(
        ok=ok,
        grad_scale=grad_scale.masked_fill(~ok, 0.0),
        variance_scale=variance_scale,
        step_size=-hyper.lr * size,
        scale_move=move,
    )


def update(group: Group, plan: Plan, chunk_elements: int) -> None:
    """Pass 3: moves the parameters and their moments in place, some tensors at a time.

    Where the step is not to be taken the same operations run with factors that change nothing: 1 on the
    moments, 0 on all that is added, and no bound on single tensors.
    """
    beta1, beta2 = group.hyper.betas
    keep1, keep2 = (_select(plan.ok, beta, 1.0, plan.grad_scale) for beta in (beta1, beta2))
    taken = plan.ok.to(plan.grad_scale.dtype)
    bound = _select(plan.ok, group.hyper.scalar_max, math.inf, plan.grad_scale)
    step_sizes, scale_moves = plan.step_size.unbind(), plan.scale_move.unbind()
    for chunk in _chunks(group.params, chunk_elements):
        v, m = group.exp_avg_sq[chunk], group.delta[chunk]
        p = [p.to(v.dtype) for p, v in zip(group.params[chunk], v, strict=True)]
        g = [
            torch.zeros_like(v) if g is None else torch.where(plan.ok, g.to(v.dtype), 0.0).mul_(plan.grad_scale)
            for g, v in zip(group.grads[chunk], v, strict=True)
        ]
        torch._foreach_mul_(v, keep2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
        denominator = torch._foreach_mul(v, plan.variance_scale)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group.hyper.eps)
        torch._foreach_div_(g, denominator)
        torch._foreach_mul_(g, step_sizes[chunk])
        torch._foreach_addcmul_(g, p, scale_moves[chunk])
        torch._foreach_mul_(m, keep1)
        torch._foreach_add_(m, g, alpha=1 - beta1)
        torch._foreach_addcmul_(p, m, [taken] * len(p))
        for old, new, single in zip(group.params[chunk], p, group.single[chunk], strict=True):
            if single:
                new.clamp_(-bound, bound)
            if new is not old:
                old.copy_(new)


def _clip(norm: Tensor, ok: Tensor, state: Statistics, clipping_scale: float) -> Tensor:
    """Records the norm, sets the threshold when it is due, and returns c, ()."""
    t = state.step
    period = state.norms.numel()
    recorded = ok & (t > 0)
    _assign(state.norms, norm, recorded & (torch.arange(period, device=t.device) == t % period))

    early = torch.zeros_like(ok)
    for estimate in EARLY_ESTIMATES:
        if estimate < period:
            early = early | (t == estimate)
    due = recorded & (early | (t % period == 0))
    count = torch.where(early, t, period)  # slots not yet filled hold 0 and are sorted to the front
    rank = period - count + torch.minimum(count - 1, count // 4 * 2)
    median = state.norms.sort().values.gather(0, rank.reshape(1)).squeeze(0)
    _assign(state.threshold, clipping_scale * median * torch.where(early, EARLY_SLACK, 1.0), due)

    factor = (state.threshold / (norm + 1e-20)).clamp(max=1.0)
    _assign(state.clipped, torch.zeros_like(t), due)
    state.clipped.add_(ok & (factor < 1.0))
    return factor


def _all_finite(norms: Sequence[Tensor], found_inf: Tensor | None) -> Tensor:
    """() bool on the first group's device: every norm is finite and no overflow was reported."""
    ok = torch.isfinite(norms[0])
    for norm in norms[1:]:
        ok = ok & torch.isfinite(norm).to(ok.device, non_blocking=True)
    return ok if found_inf is None else ok & (found_inf.reshape(()).to(ok.device, non_blocking=True) == 0)


def _assign(target: Tensor, value: Tensor, where: Tensor) -> None:
    """target = value where `where`, in place; NaN in the unused part of `value` does no harm."""
    target.copy_(torch.where(where, value, target))


def _select(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """() yes or no, exact in the dtype of `like` (torch.where on two numbers would go through float32)."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def _one_minus_power(base: float, exponent: Tensor, like: Tensor) -> Tensor:
    """1 - base^exponent in the dtype of `like`, without the cancellation that a base near 1 brings."""
    log = math.log(base) if base > 0 else -math.inf
    return -torch.expm1(exponent.to(like.dtype) * log)


def _inverse(loss_scale: Tensor | None, like: Tensor) -> Tensor:
    """() 1 / K on the device and in the dtype of `like`."""
    if loss_scale is None:
        return like.new_ones(())
    return loss_scale.reshape(()).to(device=like.device, dtype=like.dtype, non_blocking=True).reciprocal()


def _chunks(tensors: Sequence[Tensor], most: int) -> Iterator[slice]:
    """Slices of consecutive tensors with at most `most` elements in all, or of one larger tensor."""
    start = elements = 0
    for i, tensor in enumerate(tensors):
        if i > start and elements + tensor.numel() > most:
            yield slice(start, i)
            start, elements = i, 0
        elements += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))
