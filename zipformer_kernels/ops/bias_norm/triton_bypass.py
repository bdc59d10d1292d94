"""BiasNorm and the bypass after it in Triton: whole rows, several to a program, of one sequence.

Backward runs a fixed number of programs that stride over a sequence's frames; each leaves its share of the gradients of
bias, log_scale and scale in a buffer, which a second kernel adds up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zipformer_kernels.core import tuning
from zipformer_kernels.core.jit import jit
from zipformer_kernels.core.launch import cdiv, multiprocessors, next_power_of_2, on_device
from zipformer_kernels.core.op import Launchers
from zipformer_kernels.ops.bias_norm.bypass import PARTIAL_LINE, BypassGradients, BypassRows, unsupported
from zipformer_kernels.ops.bias_norm.triton_rows import inverse_rms

TILE = tuning.entry("bias_norm.triton_tile")
MOST_ROWS = tuning.entry("bias_norm.triton_rows")
WARPS = tuning.entry("bias_norm.triton_warps")
PROGRAMS_PER_MULTIPROCESSOR = tuning.entry("bias_norm.triton_programs")
SUM_COLUMNS = tuning.entry("bias_norm.triton_sum_columns")
SUM_PARTS = tuning.entry("bias_norm.triton_sum_parts")
LINE = tl.constexpr(PARTIAL_LINE)


@jit(do_not_specialize=["frames", "sequences"])
def bypass_forward(
    x_ptr,
    bias_ptr,
    log_scale_ptr,
    src_orig_ptr,
    scale_ptr,
    y_ptr,
    inverse_ptr,
    frames,
    sequences,
    C,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """R frames of a sequence per program, of BLOCK >= C channels each."""
    sequence = tl.program_id(0) % sequences
    frame = (tl.program_id(0) // sequences).to(tl.int64) * R + tl.arange(0, R)
    row = frame * sequences + sequence
    c = tl.arange(0, BLOCK)
    inside = (frame < frames)[:, None] & (c < C)[None, :]
    i = row[:, None] * C + c[None, :]
    x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
    before = tl.load(src_orig_ptr + i, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c < C, other=0.0)
    scale = tl.load(scale_ptr + sequence.to(tl.int64) * C + c, c < C, other=0.0)
    r = inverse_rms(tl.where(inside, x - bias[None, :], 0.0), C)
    s = tl.exp(tl.load(log_scale_ptr)) * r
    y = before + (x * s[:, None] - before) * scale[None, :]
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), inside)
    tl.store(inverse_ptr + row, r, frame < frames)


@jit(do_not_specialize=["frames", "sequences"])
def bypass_backward(
    dy_ptr,
    x_ptr,
    bias_ptr,
    log_scale_ptr,
    src_orig_ptr,
    scale_ptr,
    inverse_ptr,
    dx_ptr,
    dsrc_orig_ptr,
    partials_ptr,
    frames,
    sequences,
    C,
    NEEDS_X: tl.constexpr,
    NEEDS_SRC_ORIG: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """R frames of a sequence at a time, of BLOCK >= C channels each; a share of the sums per program."""
    program = tl.program_id(0).to(tl.int64)
    sequence = program % sequences
    parts = tl.num_programs(0).to(tl.int64) // sequences
    c = tl.arange(0, BLOCK)
    gain = tl.exp(tl.load(log_scale_ptr))
    bias = tl.load(bias_ptr + c, c < C, other=0.0)
    scale = tl.load(scale_ptr + sequence * C + c, c < C, other=0.0)
    dbias = tl.zeros([R, BLOCK], tl.float32)
    dscale = tl.zeros([R, BLOCK], tl.float32)
    total = tl.zeros([R], tl.float32)
    for first in range((program // sequences) * R, frames, parts * R):
        frame = first + tl.arange(0, R)
        row = frame * sequences + sequence
        inside = (frame < frames)[:, None] & (c < C)[None, :]
        i = row[:, None] * C + c[None, :]
        x = tl.load(x_ptr + i, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + i, inside, other=0.0).to(tl.float32)
        r = tl.load(inverse_ptr + row, frame < frames, other=0.0)
        s = gain * r
        if NEEDS_SUMS:
            before = tl.load(src_orig_ptr + i, inside, other=0.0).to(tl.float32)
            dscale += dy * (x * s[:, None] - before)
        through = dy * scale[None, :]
        if NEEDS_SRC_ORIG:
            tl.store(dsrc_orig_ptr + i, (dy - through).to(dsrc_orig_ptr.dtype.element_ty), inside)
        q = tl.sum(through * (x * r[:, None]), 1)
        t = tl.where(inside, (x - bias[None, :]) * r[:, None] * (s * q / C)[:, None], 0.0)
        if NEEDS_X:
            tl.store(dx_ptr + i, (s[:, None] * through - t).to(dx_ptr.dtype.element_ty), inside)
        if NEEDS_SUMS:
            dbias += t
            total += q
    if NEEDS_SUMS:
        share = partials_ptr + program * (2 * C + LINE)
        tl.store(share + c, tl.sum(dscale, 0), c < C)
        tl.store(share + C + c, tl.sum(dbias, 0), c < C)
        tl.store(share + 2 * C, gain * tl.sum(total, 0))


@triton.jit
def sums_of(from_ptr, parts, stride, inside, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of `parts` numbers that lie `stride` apart, for COLUMNS columns."""
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        where = part.to(tl.int64)[:, None] * stride
        sums += tl.load(from_ptr[None, :] + where, (part < parts)[:, None] & inside[None, :], other=0.0)
    return tl.sum(sums, 0)


@jit(do_not_specialize=["parts", "sequences"])
def bypass_sum_parts(
    partials_ptr,
    dbias_ptr,
    dlog_scale_ptr,
    dscale_ptr,
    parts,
    sequences,
    C,
    NEEDS_BIAS: tl.constexpr,
    NEEDS_LOG_SCALE: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS columns per program: of dscale, each sequence's over its own parts; and for one more sequence dbias, and
    dlog_scale in column C, over all parts.
    """
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width = 2 * C + LINE
    if sequence < sequences:
        if NEEDS_SCALE:
            own = partials_ptr + sequence * width + c
            total = sums_of(own, parts, sequences * width, c < C, PARTS, COLUMNS)
            tl.store(dscale_ptr + sequence * C + c, total, c < C)
    else:
        total = sums_of(partials_ptr + C + c, parts * sequences, width, c < C + LINE, PARTS, COLUMNS)
        if NEEDS_BIAS:
            tl.store(dbias_ptr + c, total, c < C)
        if NEEDS_LOG_SCALE:
            tl.store(dlog_scale_ptr + tl.zeros_like(c), total, c == C)


def _tile(channels: int) -> tuple[int, int]:
    """Frames and channels of a tile."""
    block = next_power_of_2(channels)
    return min(TILE.value // block, MOST_ROWS.value), block


def _forward(x: Tensor, bias: Tensor, log_scale: Tensor, src_orig: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = BypassRows(x, bias, log_scale, src_orig, scale)
    y, inverse_rms = rows.results()
    if x.numel() > 0:
        frames, sequences, channels = rows.shape
        tile = _tile(channels)
        grid = (cdiv(frames, tile[0]) * sequences,)
        with on_device(x):
            bypass_forward[grid](*rows.inputs(), y, inverse_rms, *rows.shape, *tile, num_warps=WARPS.value)
    return rows.returned(y), inverse_rms


def _backward(needs: tuple, grads: tuple, saved: tuple, *args: Tensor) -> tuple[Tensor | None, ...]:
    rows = BypassRows(*args)
    _, sequences, channels = rows.shape
    tile = _tile(channels)
    parts = rows.parts(shortest=tile[0], most=PROGRAMS_PER_MULTIPROCESSOR.value * multiprocessors(rows.x))
    out = BypassGradients(rows, needs, parts)
    if rows.x.numel() > 0:
        outputs = saved[0], out.dx, out.dsrc_orig, out.partials
        wanted = needs[0], needs[3], out.partials is not None
        tensors = grads[0].contiguous(), *rows.inputs(), *outputs
        with on_device(rows.x):
            bypass_backward[(parts * sequences,)](*tensors, *rows.shape, *wanted, *tile, num_warps=WARPS.value)
            if out.partials is not None:
                tile = SUM_PARTS.value, SUM_COLUMNS.value
                grid = sequences + 1, cdiv(channels + 1, tile[1])
                wanted = needs[1], needs[2], needs[4]
                sums = out.partials, out.dbias, out.dlog_scale, out.dscale, parts, sequences, channels
                bypass_sum_parts[grid](*sums, *wanted, *tile, num_warps=WARPS.value)
    return out.returned()


def _unsupported(x: Tensor, *others: Tensor) -> str | None:
    reason = unsupported(x, *others)
    if reason is None and next_power_of_2(x.shape[-1]) > TILE.value:
        return f"it takes rows of at most {TILE.value} channels, got {x.shape[-1]}"
    return reason


launchers = Launchers(_unsupported, _forward, _backward)
