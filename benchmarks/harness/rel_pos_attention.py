"""Attention with relative positions as Conformers have it, written plainly beside `rel_pos_attention`.

Projections are left out. The plain one is what recipes write: two products, a shift by padding and cutting, softmax and
a product. It writes down all pairs of frames several times; ours does so where the attention weights are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import op_jobs, peers
from benchmarks.harness.job import Job
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.op_jobs import CHECKED_TO, Passes, off
from benchmarks.harness.peers import Agreement, Prepared, Run, Unserved
from zipformer_kernels import rel_pos_attention

PEERS = ("plain", "compiled", "ours")
DIRECTIONS = ("forward", "both")
WIDTH = 64  # channels of a head, of its positions, and of its values
ON_GPU = {"8 heads, 30 x 1500 frames": (1500, 30, 8), "8 heads, 16 x 500 frames": (500, 16, 8)}
ON_CPU = {"4 heads, 4 x 500 frames": (500, 4, 4), "4 heads, 4 x 1500 frames": (1500, 4, 4)}
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = ON_GPU if DEVICE.type == "cuda" else ON_CPU
"""Frames, batch and heads, by name."""


def jobs(every: bool = False) -> Iterator[Job]:
    """One for each case and direction."""
    for name, (frames, batch, heads) in CASES.items():
        flops = 2 * frames * frames * batch * heads * 3 * WIDTH
        for direction in DIRECTIONS:
            yield Job(
                *("rel-pos-attention", name, direction, DTYPE),
                PEERS,
                partial(prepare, frames, batch, heads, direction, DTYPE),
                flops=flops if direction == "forward" else 3 * flops,
                graphs=PEERS,
                apart=True,
            )


def plain(q: Tensor, k: Tensor, v: Tensor, p: Tensor, pos: Tensor) -> Tensor:
    """softmax((q k^T + shift(p pos^T)) / sqrt(D)) v."""
    frames, positions = q.shape[2], pos.shape[2]
    by_position = F.pad(p @ pos.transpose(2, 3), (1, 0)).flatten(2)[..., frames:]
    shifted = by_position.unflatten(2, (frames, positions))[..., :frames]
    scores = (q @ k.transpose(2, 3) + shifted) * q.shape[3] ** -0.5
    return scores.softmax(dim=-1) @ v


def function(peer: str) -> Callable[..., Tensor]:
    """A peer's, of q, k, v, p and pos. Raises `Unserved` where it cannot run here."""
    if peer == "ours":
        return rel_pos_attention
    if peer == "plain":
        return plain
    reason = op_jobs.no_compiler()
    if reason is not None:
        raise Unserved(reason)
    torch._functorch.config.donated_buffer = False  # else a backward pass cannot be repeated, to be timed
    return torch.compile(plain)


def prepare(frames: int, batch: int, heads: int, direction: str, dtype: torch.dtype, wanted: Sequence[str]) -> Prepared:
    """Functions for the peers wanted, on the same inputs; results and gradients are checked against the first's."""
    torch.manual_seed(0)
    sizes = [(batch, heads, frames, WIDTH)] * 4 + [(1, heads, 2 * frames - 1, WIDTH)]
    args = tuple(torch.randn(size, device=DEVICE).to(dtype).requires_grad_() for size in sizes)
    agreement = Agreement(partial(off, alike=True), CHECKED_TO[dtype], "plain")

    def make(peer: str) -> Run:
        passes = Passes(function(peer), args)
        agreement.check(peer, passes.results())
        return passes.run(direction)

    return peers.prepare(wanted, make, agreement)
