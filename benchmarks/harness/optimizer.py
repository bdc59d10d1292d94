"""The optimizer's step over all parameters of a model: ours on each backend, upstream's ScaledAdam, and fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import models, peers, upstream
from benchmarks.harness.job import Job, off_by
from benchmarks.harness.machine import DEVICE
from benchmarks.harness.peers import Agreement, Prepared, Run, Unserved
from zipformer_kernels import ops, use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.optim import ScaledAdam

ON_GPU = DEVICE.type == "cuda"
OPTIONS = {"lr": 0.045, "clipping_scale": 2.0}
ADAMW = "AdamW(fused=True)"
CHECKED_STEPS = 5  # past the fourth, which moves the scales
CHECKED_TO = 1e-3


def jobs(every: bool = False) -> Iterator[Job]:
    """One step over all parameters of a preset's conv embed and encoder.

    On a GPU first as the replay of a CUDA graph, which is the device's time; then called from Python, whose own time
    hides much of it, and which is all that upstream's step can do: it waits for the device.
    """
    name = "L" if ON_GPU else "S"
    count = sum(p.numel() for p in models.model("ours", name).parameters())
    case, capturable = f"all parameters of {name}", (*backend.BACKENDS, ADAMW)
    for its_case, graphs in ((case, capturable), (f"{case}, called", ())) if ON_GPU else ((case, ()),):
        yield Job(
            *("scaled_adam", its_case, "step", torch.float32),
            (*backend.BACKENDS, "upstream", ADAMW),
            partial(prepare, name),
            bytes=36 * count,  # p and g read for the sums; p, g, v, m read and p, v, m written
            rounds=20,
            graphs=graphs,
        )


def prepare(name: str, wanted: Sequence[str]) -> Prepared:
    """Steps of the peers wanted, each on its own copy. Where the first takes the parameters, all but AdamW must."""
    agreement = Agreement(off_by, CHECKED_TO, "eager")

    def make(peer: str) -> Run:
        reason = unserved(peer)
        if reason is not None:
            raise Unserved(reason)
        made = parameters(name)
        run = step(peer, made)
        if peer == ADAMW:
            agreement.unchecked[peer] = "it is another optimizer"
        else:
            agreement.check(peer, movement(made, run))
        return run

    return peers.prepare(wanted, make, agreement)


def unserved(peer: str) -> str | None:
    """Why a peer cannot run here, or None if it can."""
    if peer == ADAMW:
        return None
    if peer == "upstream":
        return upstream.unavailable()
    if (peer == "triton" and backend.TRITON_INTERPRETS) or (peer == "cuda" and backend.emulated()):
        return "it runs in a simulation here"
    return ops.get("scaled_adam").unsupported(peer, *ops.example("scaled_adam", device=DEVICE))


def parameters(name: str) -> list[nn.Parameter]:
    """A preset's parameters with gradients, the same at every call."""
    made = [nn.Parameter(p.detach().to(DEVICE)) for p in models.model("ours", name).parameters()]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-2
    return made


def step(peer: str, made: list[nn.Parameter]) -> Callable[[], Any]:
    """A peer's step over the parameters as a function without arguments."""
    if peer == ADAMW:
        return torch.optim.AdamW(made, fused=True, capturable=ON_GPU).step
    if peer == "upstream":
        (module,) = upstream.load("optim")
        theirs = module.ScaledAdam(made, **OPTIONS)
        theirs.show_dominant_parameters = False  # it only logs
        return theirs.step
    ours = ScaledAdam(made, **OPTIONS)

    def run() -> None:
        with use_backend(peer):
            ours.step()

    return run


def movement(made: list[nn.Parameter], run: Callable[[], Any]) -> Tensor:
    """How far the first steps move the parameters, as one vector."""
    before = torch.cat([p.detach().flatten() for p in made])
    for _ in range(CHECKED_STEPS):
        run()
    return torch.cat([p.detach().flatten() for p in made]) - before
