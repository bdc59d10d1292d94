"""ScaledAdam in Triton: four launches for any number of tensors, over the same table as the CUDA kernels.

Kernels get the table as a tensor of 64-bit words, and turn words into pointers and numbers as they need them. See
`reference` for the formulas; the names are its.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import DTYPE_CODES, GPU_DTYPES, on_device
from zipformer_kernels.ops.scaled_adam import reference
from zipformer_kernels.ops.scaled_adam.stepper import Stepper
from zipformer_kernels.ops.scaled_adam.table import GROUP_COLUMNS, GROUP_PLAN, TENSOR_COLUMNS, TENSOR_PLAN, Table, run

CHUNK_ELEMENTS = tuning.entry("scaled_adam.triton_chunk")
BLOCK = tuning.entry("scaled_adam.triton_block")
LANES = tuning.entry("scaled_adam.triton_lanes")
SUM_LANES = tuning.entry("scaled_adam.triton_sum_lanes")
WARPS = tuning.entry("scaled_adam.triton_warps")
PLAN_WARPS = tuning.entry("scaled_adam.triton_plan_warps")

F16 = tl.constexpr(DTYPE_CODES[torch.float16])
BF16 = tl.constexpr(DTYPE_CODES[torch.bfloat16])
EARLY = tuple(tl.constexpr(t) for t in reference.EARLY_ESTIMATES)
EARLY_0, EARLY_1, EARLY_2 = EARLY
EARLY_SLACK = tl.constexpr(reference.EARLY_SLACK)
MAX_SCALE_MOVE = tl.constexpr(reference.MAX_SCALE_MOVE)
CORRECTED_BELOW = tl.constexpr(reference.CORRECTED_BELOW)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

ROW = tl.constexpr(len(TENSOR_COLUMNS))
GROUP_ROW = tl.constexpr(len(GROUP_COLUMNS))
PLAN = tl.constexpr(TENSOR_PLAN)
PLAN_OF_GROUP = tl.constexpr(GROUP_PLAN)
P, G, V, M, NUMEL, FIRST_CHUNK, GROUP, P_DTYPE, G_DTYPE = (tl.constexpr(i) for i in range(len(TENSOR_COLUMNS)))
(
    _,
    FIRST_TENSOR,
    COUNT,
    SIZE_PERIOD,
    CLIPPING_PERIOD,
    STEP,
    SKIPPED,
    CLIPPED,
    NORMS,
    THRESHOLD,
    RMS,
    SCALE_EXP_AVG_SQ,
    SCALE_GRADS,
    CONTRIBUTIONS,
    SIZES,
    SINGLE,
    LR_TENSOR,
    LR,
    CLIPPING_SCALE,
    BETA1,
    BETA2,
    SCALAR_LR_SCALE,
    EPS,
    PARAM_MIN_RMS,
    PARAM_MAX_RMS,
    SCALAR_MAX,
) = (tl.constexpr(i) for i in range(len(GROUP_COLUMNS)))


@triton.jit
def floats(row, COLUMN: tl.constexpr):
    """The pointer to float32 in a column of a row."""
    return tl.load(row + COLUMN).to(tl.pointer_type(tl.float32))


@triton.jit
def counter(row, COLUMN: tl.constexpr):
    """The pointer to int64 in a column of a row."""
    return tl.load(row + COLUMN).to(tl.pointer_type(tl.int64))


@triton.jit
def double(row, COLUMN: tl.constexpr):
    """The number in a column of a row."""
    return tl.load(row + COLUMN).to(tl.float64, bitcast=True)


@triton.jit
def option(row, COLUMN: tl.constexpr):
    """The number in a column of a row, in float32."""
    return double(row, COLUMN).to(tl.float32)


@triton.jit
def one_minus_power(base, exponent):
    """1 - base^exponent, computed in float64 for what cancels."""
    return (1.0 - tl.exp(exponent.to(tl.float64) * tl.log(base))).to(tl.float32)


@triton.jit
def load_wide(address, dtype, i, inside):
    """Elements i of the tensor of a dtype at an address, in float32; zeros where there is none."""
    inside = inside & (address != 0)
    if dtype == F16:
        x = tl.load(address.to(tl.pointer_type(tl.float16)) + i, inside, other=0.0).to(tl.float32)
    elif dtype == BF16:
        x = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + i, inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + i, inside, other=0.0)
    return x


@triton.jit
def find_chunk(words, tensors, index, CHUNK: tl.constexpr):
    """Where chunk `index` lies: the row of its tensor, the tensor's number, its first element and its end."""
    low = tl.full((), 0, tl.int64)
    high = low + tensors - 1
    while low < high:
        middle = low + (high - low + 1) // 2
        below = tl.load(words + middle * ROW + FIRST_CHUNK) <= index
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    row = words + low * ROW
    begin = (index - tl.load(row + FIRST_CHUNK)) * CHUNK
    return row, low, begin, tl.minimum(begin + CHUNK, tl.load(row + NUMEL))


@jit(do_not_specialize=["tensors", "chunks"])
def partials_kernel(words, partials_ptr, tensors, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row, _, begin, end = find_chunk(words, tensors, tl.program_id(0).to(tl.int64), CHUNK)
    p_address, p_dtype = tl.load(row + P), tl.load(row + P_DTYPE)
    g_address, g_dtype = tl.load(row + G), tl.load(row + G_DTYPE)
    pp = tl.zeros((BLOCK,), tl.float32)
    pg = tl.zeros((BLOCK,), tl.float32)
    gg = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < end
        p = load_wide(p_address, p_dtype, i, inside)
        g = load_wide(g_address, g_dtype, i, inside)
        pp += p * p
        pg += p * g
        gg += g * g
    out = partials_ptr + tl.program_id(0).to(tl.int64)
    tl.store(out, tl.sum(pp))
    tl.store(out + chunks, tl.sum(pg))
    tl.store(out + 2 * chunks, tl.sum(gg))


@jit(do_not_specialize=["tensors", "chunks"])
def sums_kernel(words, partials_ptr, sums_ptr, tensors, chunks, LANES: tl.constexpr):
    """Adds up the partial sums of one tensor."""
    i = tl.program_id(0).to(tl.int64)
    row = words + i * ROW
    begin = tl.load(row + FIRST_CHUNK)
    end = tl.load(row + ROW + FIRST_CHUNK, i + 1 < tensors, other=chunks)
    pp = tl.zeros((LANES,), tl.float64)
    pg = tl.zeros((LANES,), tl.float64)
    gg = tl.zeros((LANES,), tl.float64)
    for first in range(begin, end, LANES):
        c = first + tl.arange(0, LANES)
        inside = c < end
        pp += tl.load(partials_ptr + c, inside, other=0.0).to(tl.float64)
        pg += tl.load(partials_ptr + chunks + c, inside, other=0.0).to(tl.float64)
        gg += tl.load(partials_ptr + 2 * chunks + c, inside, other=0.0).to(tl.float64)
    tl.store(sums_ptr + i, tl.sum(pp).to(tl.float32))
    tl.store(sums_ptr + tensors + i, tl.sum(pg).to(tl.float32))
    tl.store(sums_ptr + 2 * tensors + i, tl.sum(gg).to(tl.float32))


@triton.jit
def measure(group, squares_ptr, inverse_loss_scale, LANES: tl.constexpr):
    """The group's gradient norm; stores what each tensor contributes to its square."""
    count = tl.load(group + COUNT)
    scalar_lr_scale = option(group, SCALAR_LR_SCALE)
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, count, LANES):
        i = first + tl.arange(0, LANES)
        inside = i < count
        single = tl.load(tl.load(group + SINGLE).to(tl.pointer_type(tl.int8)) + i, inside, other=0) != 0
        rms = tl.load(floats(group, RMS) + i, inside, other=0.0)
        weight = tl.where(single, scalar_lr_scale, rms) * inverse_loss_scale
        contribution = weight * weight * tl.load(squares_ptr + i, inside, other=0.0)
        tl.store(floats(group, CONTRIBUTIONS) + i, contribution, inside)
        total += tl.sum(contribution.to(tl.float64))
    return tl.sqrt(total.to(tl.float32))


@triton.jit
def set_threshold(group, t, early, LANES: tl.constexpr):
    """clipping_scale times the median of the norms, found by counting how many are smaller than each."""
    period = tl.load(group + CLIPPING_PERIOD)
    norms_ptr = floats(group, NORMS)
    count = tl.where(early, t, period)  # slots not yet filled hold 0 and are sorted to the front
    wanted = period - count + tl.minimum(count - 1, count // 4 * 2)
    median = tl.full((), 0.0, tl.float32)
    for first in range(0, period, LANES):
        i = first + tl.arange(0, LANES)
        norm = tl.load(norms_ptr + i, i < period, other=0.0)
        rank = tl.zeros((LANES,), tl.int64)
        for j in range(0, period):
            other = tl.load(norms_ptr + j)
            rank += ((other < norm) | ((other == norm) & (j < i))).to(tl.int64)
        median += tl.sum(tl.where((rank == wanted) & (i < period), norm, 0.0))
    slack = tl.where(early, EARLY_SLACK, 1.0)
    tl.store(floats(group, THRESHOLD), option(group, CLIPPING_SCALE) * median * slack)


@triton.jit
def clip(group, t, norm, LANES: tl.constexpr):
    """Records the norm, sets the clipping threshold when it is due, and returns c."""
    factor = tl.full((), 1.0, tl.float32)
    if option(group, CLIPPING_SCALE) > 0:
        period = tl.load(group + CLIPPING_PERIOD)
        if t > 0:
            tl.store(floats(group, NORMS) + t % period, norm)
        tl.debug_barrier()
        early = (t < period) & ((t == EARLY_0) | (t == EARLY_1) | (t == EARLY_2))
        due = early | ((t > 0) & (t % period == 0))
        if due:
            set_threshold(group, t, early, LANES)
        tl.debug_barrier()
        factor = tl.minimum(tl.load(floats(group, THRESHOLD)) / (norm + 1e-20), 1.0)
        clipped = tl.where(due, 0, tl.load(counter(group, CLIPPED)))
        tl.debug_barrier()
        tl.store(counter(group, CLIPPED), clipped + (factor < 1.0).to(tl.int64))
    return factor


@triton.jit
def plan_tensors(group, sums_ptr, plans_ptr, tensors, t, grad_scale, LANES: tl.constexpr):
    """Advances the statistics of a group's tensors, and plans their updates."""
    count = tl.load(group + COUNT)
    period = tl.load(group + SIZE_PERIOD)
    slot = t % period
    scale_grads_ptr = floats(group, SCALE_GRADS)
    lr = option(group, LR)
    if tl.load(group + LR_TENSOR) != 0:
        lr = tl.load(floats(group, LR_TENSOR))
    scalar_lr_scale = option(group, SCALAR_LR_SCALE)
    min_rms = option(group, PARAM_MIN_RMS)
    beta2 = double(group, BETA2)
    fresh = one_minus_power(beta2, period)
    correction = tl.sqrt(one_minus_power(beta2, (t + 1) // period * period))
    for first in range(0, count, LANES):
        i = first + tl.arange(0, LANES)
        inside = i < count
        single = tl.load(tl.load(group + SINGLE).to(tl.pointer_type(tl.int8)) + i, inside, other=0) != 0
        newest = grad_scale * tl.load(sums_ptr + tensors + i, inside, other=0.0)
        tl.store(scale_grads_ptr + slot * count + i, newest, inside)
        rms = tl.load(floats(group, RMS) + i, inside, other=1.0)
        move = tl.zeros((LANES,), tl.float32)
        if slot == period - 1:
            squares = tl.load(sums_ptr + i, inside, other=1.0)
            rms = tl.sqrt(squares / tl.load(floats(group, SIZES) + i, inside, other=1.0))
            tl.store(floats(group, RMS) + i, rms, inside)
            if t > 0:
                total = tl.zeros((LANES,), tl.float32)
                square = tl.zeros((LANES,), tl.float32)
                for k in range(0, period):
                    scale_grad = tl.load(scale_grads_ptr + k * count + i, inside & (k != slot), other=0.0)
                    scale_grad = tl.where(k == slot, newest, scale_grad)
                    total += scale_grad
                    square += scale_grad * scale_grad
                u_ptr = floats(group, SCALE_EXP_AVG_SQ) + i
                u = tl.load(u_ptr, inside, other=1.0)
                u = (1.0 - fresh) * u + fresh * (square / period.to(tl.float32))
                tl.store(u_ptr, u, inside)
                move = -lr * scalar_lr_scale * correction * total / (tl.sqrt(u) + option(group, EPS))
                move = tl.where(rms < min_rms, 0.0, move)
                move = tl.maximum(tl.minimum(move, MAX_SCALE_MOVE), -MAX_SCALE_MOVE)
                move = tl.minimum(move, (option(group, PARAM_MAX_RMS) - rms) / rms)
                move = tl.where(single, 0.0, move)
        size = tl.where(single, scalar_lr_scale, tl.maximum(rms, min_rms))
        tl.store(plans_ptr + i * PLAN, -lr * size, inside)
        tl.store(plans_ptr + i * PLAN + 1, move, inside)


@jit(do_not_specialize=["tensors", "groups"])
def plan_kernel(words, sums_ptr, plans_ptr, loss_scale_ptr, found_inf_ptr, tensors, groups, LANES: tl.constexpr):
    """One program: measures the gradients, and plans the updates."""
    group_rows = words + tensors * ROW
    group_plans = plans_ptr + tensors * PLAN
    inverse_loss_scale = tl.full((), 1.0, tl.float32)
    if loss_scale_ptr is not None:
        inverse_loss_scale = 1.0 / tl.load(loss_scale_ptr)
    failures = tl.full((), 0, tl.int32)
    if found_inf_ptr is not None:
        failures += (tl.load(found_inf_ptr) != 0).to(tl.int32)
    for k in range(0, groups):
        group = group_rows + k * GROUP_ROW
        norm = measure(group, sums_ptr + 2 * tensors + tl.load(group + FIRST_TENSOR), inverse_loss_scale, LANES)
        finite = norm <= LARGEST  # false for NaN
        failures += tl.where(finite, 0, 1)
        tl.store(group_plans + k * PLAN_OF_GROUP + 1, norm)  # until its plan takes the place
    tl.debug_barrier()
    for k in range(0, groups):
        group = group_rows + k * GROUP_ROW
        plan_ptr = group_plans + k * PLAN_OF_GROUP
        if failures == 0:
            first = tl.load(group + FIRST_TENSOR)
            t = tl.load(counter(group, STEP))
            grad_scale = clip(group, t, tl.load(plan_ptr + 1), LANES) * inverse_loss_scale
            plan_tensors(group, sums_ptr + first, plans_ptr + first * PLAN, tensors, t, grad_scale, LANES)
            bias = one_minus_power(double(group, BETA2), t + 1)
            tl.debug_barrier()
            tl.store(plan_ptr, 1.0)
            tl.store(plan_ptr + 1, grad_scale)
            tl.store(plan_ptr + 2, tl.where(bias < CORRECTED_BELOW, 1.0 / bias, 1.0))
            tl.store(counter(group, STEP), t + 1)
        else:
            skipped = tl.load(counter(group, SKIPPED))
            tl.debug_barrier()
            tl.store(counter(group, SKIPPED), skipped + 1)
            tl.store(plan_ptr, 0.0)


@jit(do_not_specialize=["tensors"])
def update_kernel(words, plans_ptr, tensors, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row, index, begin, end = find_chunk(words, tensors, tl.program_id(0).to(tl.int64), CHUNK)
    number = tl.load(row + GROUP)
    plan_ptr = plans_ptr + tensors * PLAN + number * PLAN_OF_GROUP
    if tl.load(plan_ptr) != 0:
        group = words + tensors * ROW + number * GROUP_ROW
        grad_scale = tl.load(plan_ptr + 1)
        variance_scale = tl.load(plan_ptr + 2)
        step_size = tl.load(plans_ptr + index * PLAN)
        scale_move = tl.load(plans_ptr + index * PLAN + 1)
        beta1, new1 = option(group, BETA1), (1.0 - double(group, BETA1)).to(tl.float32)
        beta2, new2 = option(group, BETA2), (1.0 - double(group, BETA2)).to(tl.float32)
        eps = option(group, EPS)
        in_group = index - tl.load(group + FIRST_TENSOR)
        single = tl.load(tl.load(group + SINGLE).to(tl.pointer_type(tl.int8)) + in_group) != 0
        bound = tl.where(single, option(group, SCALAR_MAX), float("inf"))

        p_address, p_dtype = tl.load(row + P), tl.load(row + P_DTYPE)
        g_address, g_dtype = tl.load(row + G), tl.load(row + G_DTYPE)
        v_ptr, m_ptr = floats(row, V), floats(row, M)
        for first in range(begin, end, BLOCK):
            i = first + tl.arange(0, BLOCK)
            inside = i < end
            p = load_wide(p_address, p_dtype, i, inside)
            g = load_wide(g_address, g_dtype, i, inside) * grad_scale
            v = beta2 * tl.load(v_ptr + i, inside, other=0.0) + new2 * (g * g)
            d = step_size * (g / (tl.sqrt(variance_scale * v) + eps)) + scale_move * p
            m = beta1 * tl.load(m_ptr + i, inside, other=0.0) + new1 * d
            p = tl.minimum(tl.maximum(p + m, -bound), bound)
            tl.store(v_ptr + i, v, inside)
            tl.store(m_ptr + i, m, inside)
            if p_dtype == F16:
                tl.store(p_address.to(tl.pointer_type(tl.float16)) + i, p.to(tl.float16), inside)
            elif p_dtype == BF16:
                tl.store(p_address.to(tl.pointer_type(tl.bfloat16)) + i, p.to(tl.bfloat16), inside)
            else:
                tl.store(p_address.to(tl.pointer_type(tl.float32)) + i, p, inside)


def _launch(name: str, table: Table, loss_scale: Tensor | None, found_inf: Tensor | None) -> None:
    words, tensors, chunks = table.words(), table.tensors, table.chunks
    shares = table.chunk_elements, BLOCK.value
    with on_device(table.sums):
        if name == "sums":
            sums_kernel[(tensors,)](words, table.partials, table.sums, tensors, chunks, SUM_LANES.value, num_warps=1)
        elif name == "plan":
            plan_kernel[(1,)](
                words,
                table.sums,
                table.plans,
                loss_scale,
                found_inf,
                tensors,
                table.groups,
                LANES.value,
                num_warps=PLAN_WARPS.value,
            )
        elif chunks == 0:
            return
        elif name == "partials":
            partials_kernel[(chunks,)](words, table.partials, tensors, chunks, *shares, num_warps=WARPS.value)
        else:
            update_kernel[(chunks,)](words, table.plans, tensors, *shares, num_warps=WARPS.value)


def _step(groups, loss_scale, found_inf, reduce, tables):
    run(groups, reduce, loss_scale, found_inf, tables, CHUNK_ELEMENTS.value, torch.float32, _launch)


launchers = Stepper(GPU_DTYPES, _step)
