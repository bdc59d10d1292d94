"""A whole encoder on the device, in bfloat16 by autocast: whether it is right, and where its time and memory go.

``python model.py OUT.json STAGE``, where a stage is

    right    outputs and all gradients, on each backend, against upstream in float64 (and what rounding explains)
    train    a training step, ours and upstream's: milliseconds, peak memory, the kernels that take longest
    step     a training step with the optimizer's, without Python's draws: called, and by `GraphedStep`
    infer    the same of inference, and ours with weights in bfloat16
    latency  one recording at a time, called, as the replay of a CUDA graph, and by `graphed`
    adam     the optimizer's step over all parameters

On a GPU preset L on 30 x 30 s; without one preset S on a second or two, to try the stages themselves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.found import Found, ends
from benchmarks.gpu.kernels import kernels_of
from benchmarks.harness import models, optimizer, statistics
from benchmarks.harness.check import FACTOR, Errors, Results, boost, errors
from benchmarks.harness.machine import DEVICE, synchronize
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.peers import attempt
from benchmarks.harness.timing import captured
from zipformer_kernels import GraphedStep, ScaledAdam, graphed, use_backend
from zipformer_kernels.core import backend
from zipformer_kernels.graphs import CudaGraphs, Graphed
from zipformer_kernels.graphs.capture import Graphs

ON_GPU = DEVICE.type == "cuda"
NAME, BATCH, SECONDS = ("L", 30, 30) if ON_GPU else ("S", 1, 2)
CHECKED = {"batch": 3, "seconds": 8} if ON_GPU else {"batch": 2, "seconds": 1}
DTYPE = torch.bfloat16
TIMED = DTYPE if ON_GPU else torch.float32  # upstream does not train in bfloat16 on a CPU
PEERS = ("ours", "upstream")
torch.backends.cudnn.allow_tf32 = False  # rounding is what others are measured by
ROUNDS = {"train": 3, "step": 5, "infer": 5, "latency": 20, "adam": 20}
LONGEST = 10  # kernels that are printed; the file has all

Run = Callable[[], Any]


def main() -> int:
    """Runs a stage; 1 if anything in it failed or was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("stage", choices=STAGES)
    arguments = parser.parse_args()
    found = Found(arguments.output, arguments.stage)
    STAGES[arguments.stage](found)
    return int(any("failed" in row or row.get("ok") is False for row in found.rows))


# ---- right ----


def encoder(peer: str) -> models.Encoder:
    """A peer's encoder on the device, its attention boosted so that it counts."""
    return boost(models.Encoder(models.encoder(peer, NAME)).to(DEVICE))


def results(peer: str, where: str, dtype: torch.dtype) -> Results:
    """The output in eval mode, and output and gradients of a training step, of a peer's encoder on a backend."""
    x = partial(models.frames, NAME, CHECKED["batch"], CHECKED["seconds"])
    module = encoder(peer)
    module = module.double() if dtype == torch.float64 else module
    with use_backend(where):
        evaluated = models.evaluated(x, module, dtype)["output"]
        return {"evaluated": evaluated} | models.trained(x, module, dtype)


def apart(one: Results, exact: Results) -> tuple[float, Errors]:
    """How far results are from exact ones: in eval mode, and in training."""
    one, exact = dict(one), dict(exact)
    evaluated = errors({"output": one.pop("evaluated")}, {"output": exact.pop("evaluated")}).output
    return evaluated, errors(one, exact)


def right(found: Found) -> None:
    """Our encoder on each backend, held to `FACTOR` times what our reference in that dtype is off by rounding alone.

    Exact is upstream in float64, or where there is no upstream our reference.
    """
    absent = models.unserved("upstream")
    if absent is not None:
        found.add(f"held against our own reference: {absent}", against="ours")
    exact = results("ours" if absent else "upstream", "eager", torch.float64)
    for dtype in (DTYPE, torch.float32):
        short = str(dtype).removeprefix("torch.")
        rounding, trained = apart(results("ours", "eager", dtype), exact)
        allowed = {"evaluated": rounding, "output": trained.output, "gradients": trained.gradients}
        for where in ("triton", "cuda", "auto") if ON_GPU else ("auto",):
            if backend.missing.get(where):
                found.add(f"BAD  {short} {where}: {backend.missing[where]}", backend=where, dtype=short, ok=False)
                continue
            got, reason = attempt(lambda where=where, dtype=dtype: apart(results("ours", where, dtype), exact))
            if reason is not None:
                found.add(f"BAD  {short} {where}: {reason}", backend=where, dtype=short, ok=False, failed=reason)
                continue
            evaluated, trained = got
            off = {"evaluated": evaluated, "output": trained.output, "gradients": trained.gradients}
            share = {name: off[name] / (FACTOR * allowed[name]) for name in off}
            worst = sorted(trained.parameters.items(), key=lambda item: -item[1])[:4]
            ok = all(x <= 1 for x in share.values())
            text = ", ".join(f"{name} {off[name]:.1e} ({share[name]:.2f} of allowed)" for name in off)
            found.add(
                f"{'ok ' if ok else 'BAD'}  {short} {where}: {text}; worst gradient {worst[0][0]} {worst[0][1]:.1e}",
                **{"backend": where, "dtype": short, "ok": ok, "off": off, "of_allowed": share, "worst": worst},
            )


# ---- time, memory, kernels ----


def timed(found: Found, name: str, make: Callable[[], Run], rounds: int, kernels: bool = True) -> None:
    """Adds a row of a function: its first call, which compiles, the next ones, its peak of memory and its kernels."""
    absent = models.unserved("upstream") if "upstream" in name else None
    if absent is not None:
        found.add(f"{name}: {absent}", name=name, skipped=absent)
        return
    row, reason = attempt(measured, make, rounds, kernels)
    if reason is not None:
        found.add(f"{name}: {reason}", name=name, failed=reason)
        return
    listed = row.get("kernels", [])
    line = (
        f"{name}: {statistics.median(row['ms']):.2f} ms ({', '.join(f'{ms:.1f}' for ms in row['ms'][:6])}), first call "
    )
    line += f"{row['first_s']:.1f} s, peak {row['peak_bytes'] / 1e9:.2f} GB"
    if listed:
        line += f", {sum(kernel['count'] for kernel in listed)} kernels in {sum(k['ms'] for k in listed):.2f} ms"
    longest = (f"\n    {k['ms']:8.2f} ms {k['count']:5d} x {k['name'][:90]}" for k in listed[:LONGEST])
    found.add(line + "".join(longest), name=name, **row)


def measured(make: Callable[[], Run], rounds: int, kernels: bool) -> dict[str, Any]:
    """The numbers of a row."""
    run = make()
    first = seconds(run)
    run()
    synchronize()
    row = {"first_s": first, "ms": [1e3 * seconds(run) for _ in range(rounds)], "peak_bytes": peak(run)}
    return row | ({"kernels": kernels_of(run)} if kernels else {})


def seconds(run: Run) -> float:
    """Of one call, from an idle device to an idle device."""
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def peak(run: Run) -> int:
    """The most memory that tensors take in a call, parameters and gradients included; on a CPU without them."""
    if not ON_GPU:
        return peak_bytes(run)
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated()


def train(found: Found) -> None:
    """A training step: forward and backward of the encoder."""
    x = partial(models.frames, NAME, BATCH, SECONDS)
    for peer in PEERS:
        timed(found, f"train {peer}", partial(_run, peer, partial(models.training, x, TIMED)), ROUNDS["train"])


def step(found: Found) -> None:
    """Whole training steps of the encoder with ScaledAdam, and nothing that Python draws."""
    for name, graphs in (("called", None), ("graphed", CudaGraphs() if ON_GPU else None)):
        timed(found, f"step ours, {name}", partial(_whole_step, graphs), ROUNDS["step"], kernels=False)


def infer(found: Found) -> None:
    """The encoder in eval mode, without gradients."""
    x = partial(models.frames, NAME, BATCH, SECONDS)
    for peer in (*PEERS, models.OURS_IN_BFLOAT16):
        timed(found, f"infer {peer}", partial(_run, peer, partial(models.inference, x, TIMED)), ROUNDS["infer"])


def latency(found: Found) -> None:
    """One recording; on a GPU also without Python between the kernels."""
    x = partial(models.frames, NAME, 1, SECONDS)
    for peer in PEERS:
        make = partial(_run, peer, partial(models.inference, x, TIMED))
        timed(found, f"latency {peer}", make, ROUNDS["latency"], kernels=False)
        if ON_GPU:
            timed(found, f"latency {peer}, graph", lambda make=make: captured(make()), ROUNDS["latency"], kernels=False)
    for peer in ("ours", models.OURS_IN_BFLOAT16):
        make = partial(_run, peer, partial(models.inference, x, TIMED), graphed)
        timed(found, f"latency {peer}, graphed", make, ROUNDS["latency"], kernels=False)


def adam(found: Found) -> None:
    """The optimizer's step over all parameters of the preset."""
    for peer in ("cuda", "triton", "upstream", optimizer.ADAMW) if ON_GPU else ("cpu", "upstream"):
        timed(found, f"adam {peer}", partial(_step, peer), ROUNDS["adam"], kernels=peer in backend.BACKENDS)


def _run(
    peer: str, make_run: Callable[[nn.Module], Callable[[], Tensor]], change: Callable[[nn.Module], Any] | None = None
) -> Run:
    """A peer's run, of the model or of what `change` makes of it in eval mode."""
    module = models.Encoder(models.encoder(peer, NAME)).to(DEVICE)
    if peer == models.OURS_IN_BFLOAT16:
        module = models.InBfloat16(module)
    return make_run(module if change is None else _Called(change(module.eval())))


class _Called(nn.Module):
    """A callable as a module, whose parameters are those of its model."""

    def __init__(self, call: Graphed) -> None:
        super().__init__()
        self.model, self.call = call.model, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def _whole_step(graphs: Graphs | None) -> Run:
    """A training step by `GraphedStep`, captured by `graphs`, or called where there are none."""
    module = models.Encoder(models.encoder("ours", NAME)).to(DEVICE)
    models.in_training(module)
    models.seed(0)
    x = models.frames(NAME, BATCH, SECONDS)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        with models.autocast(TIMED):
            y = module(x)
        return y.float().square().mean()

    step = GraphedStep(
        module, loss, ScaledAdam(module.parameters(), **optimizer.OPTIONS), graphs=graphs or Uncaptured()
    )
    for _ in range(2):  # what comes before the capture
        step(x)
    return partial(step, x)


class Uncaptured:
    """Captures nothing on any device."""

    def serves(self, device: torch.device) -> bool:
        return False


def _step(peer: str) -> Run:
    return optimizer.step(peer, optimizer.parameters(NAME))


STAGES = {"right": right, "train": train, "step": step, "infer": infer, "latency": latency, "adam": adam}

if __name__ == "__main__":
    sys.exit(ends(main))
