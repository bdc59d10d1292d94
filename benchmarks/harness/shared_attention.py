"""What a layer does with its attention weights: made once, averaged with by NonlinAttention and by SelfAttention twice.

Projections are left out. The benchmarks of the ops `attention` and `nonlin_attention` time one use of weights whose
largest scores and scales are given; here ours goes through `AttentionWeights` on ``auto``, which on a CPU keeps small
weights and computes large ones again at each use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zipformer_kernels.modules
from benchmarks.harness import models, peers, upstream
from benchmarks.harness.job import Job
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.op_jobs import CHECKED_TO, Passes, off
from benchmarks.harness.others import bare
from benchmarks.harness.peers import Agreement, Prepared, Run, Unserved
from zipformer_kernels import use_backend

QUERY, POSITION, VALUE = 32, 4, 12  # channels of a head
PEERS = ("upstream", "upstream compiled", "eager", "ours")
DIRECTIONS = ("forward", "both")
ON_GPU = {"L stack 0, 30 x 30 s": (1500, 30, 4, 144), "L stack 3, 30 x 30 s": (188, 30, 8, 576)}
ON_CPU = {
    "S stack 1, 4 x 16 s": (400, 4, 4, 192),
    "S stack 3, 4 x 16 s": (100, 4, 8, 192),
    "S stack 0, 1 x 60 s": (3000, 1, 4, 144),
}
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = ON_GPU if DEVICE.type == "cuda" else ON_CPU
"""Frames, batch, heads, and channels of NonlinAttention, by name."""


class Attentions(nn.Module):
    """All uses of one layer's attention weights, by modules of upstream's or of ours, which have the same names."""

    def __init__(self, modules: Any, heads: int, hidden: int) -> None:
        super().__init__()
        weights = modules.RelPositionMultiheadAttentionWeights(
            1, 1, heads, QUERY, POSITION, dropout=0.0, pos_emb_skip_rate=0.0
        )
        self.weights = bare(weights, "in_proj", "linear_pos", "whiten_keys", "balance_keys")
        nonlin = modules.NonlinAttention(1, hidden)
        self.nonlin = bare(nonlin, "in_proj", "out_proj", "balancer", "whiten1", "whiten2")
        self.attention = bare(modules.SelfAttention(1, 1, 1), "in_proj", "out_proj", "whiten")

    def forward(self, x: Tensor, positions: Tensor, parts: Tensor, first: Tensor, second: Tensor) -> Tensor:
        handle = getattr(self.weights, "handle", None)
        w = self.weights(x, positions) if handle is None else handle(x, positions)[0]  # upstream's has no handles
        return torch.cat([self.nonlin(parts, w[0:1]), self.attention(first, w), self.attention(second, w)], dim=2)


def jobs(every: bool = False) -> Iterator[Job]:
    """One for each case and direction."""
    for name, (frames, batch, heads, hidden) in CASES.items():
        channels = heads * (QUERY + POSITION) + hidden + 2 * heads * VALUE
        flops = 2 * frames * frames * batch * channels
        for direction in DIRECTIONS:
            yield Job(
                *("shared-attention", name, direction, DTYPE),
                PEERS,
                partial(prepare, frames, batch, heads, hidden, direction, DTYPE),
                flops=flops if direction == "forward" else 3 * flops,
                graphs=PEERS,
            )


def inputs(frames: int, batch: int, heads: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The projections that the modules would make: q, k, p; positions; NonlinAttention's parts; values, twice."""
    sizes = [
        (frames, batch, heads * (2 * QUERY + POSITION)),
        (1, 2 * frames - 1, heads * POSITION),
        (frames, batch, 3 * hidden),
        *2 * [(frames, batch, heads * VALUE)],
    ]
    scales = (QUERY**-0.25, 1.0, 1.0, 1.0, 1.0)
    drawn = (scale * torch.randn(size, device=DEVICE) for size, scale in zip(sizes, scales, strict=True))
    return tuple(x.to(dtype).requires_grad_() for x in drawn)


def prepare(
    frames: int, batch: int, heads: int, hidden: int, direction: str, dtype: torch.dtype, wanted: Sequence[str]
) -> Prepared:
    """Functions for the peers wanted, on the same inputs; results and gradients are checked against the first's."""
    torch.manual_seed(0)
    args = inputs(frames, batch, heads, hidden, dtype)
    agreement = Agreement(partial(off, alike=True), CHECKED_TO[dtype], "upstream")

    def make(peer: str) -> Run:
        reason = None if peer == "eager" else models.unserved(peer)
        if reason is not None:
            raise Unserved(reason)
        module = function(peer, heads, hidden)

        def averaged(*args: Tensor) -> Tensor:
            with models.autocast(dtype):
                return module(*args)

        passes = Passes(averaged, args)
        agreement.check(peer, passes.results())
        return passes.run(direction)

    return peers.prepare(wanted, make, agreement)


def function(peer: str, heads: int, hidden: int) -> Callable[..., Tensor]:
    """A peer's module."""
    if peer == "ours":
        return Attentions(zipformer_kernels.modules, heads, hidden)
    if peer == "eager":
        return use_backend("eager")(Attentions(zipformer_kernels.modules, heads, hidden))
    (module,) = upstream.load("zipformer")
    theirs = Attentions(module, heads, hidden)
    return theirs if peer == "upstream" else torch.compile(theirs)
