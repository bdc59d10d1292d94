"""What the kernels of every op and of the whole model L would do on a GPU: recorded, disassembled, predicted."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu import recording
from benchmarks.gpu.recording import Launch
from benchmarks.gpu.roofline import MACHINES, Machine, predicted, resident_blocks, work_of
from benchmarks.gpu.sass import Kernel, disassemble, disassemble_cubin
from benchmarks.gpu.trips import block_of_targets, executed
from benchmarks.harness import models
from zipformer_kernels import ops
from zipformer_kernels.ops.cases import BATCH, FRAMES, Case
from zipformer_kernels.ops.scaled_adam.cases import CASES as ADAM_CASES

RESIDUAL_OPS = ("bias_norm", "bias_norm.bypass", "bypass", "downsample", "upsample_bypass")
OPS = ("swoosh", "swoosh_linear", *RESIDUAL_OPS, "conv_module", "attention", "nonlin_attention")
STACKS = tuple(f"L stack {i}, {BATCH} x 30 s" for i in range(4))
BETWEEN = ("into L stack", "around L stack", "output of L")
BACKENDS = ("triton", "cuda")
ATTENTION = ("attention", "nonlin_attention")
ADAM_BYTES = {"scaled_adam.partials_kernel": 8, "scaled_adam.update_kernel": 28}
"""A parameter in float32: p, g in; p, g, v, m in and p, v, m out. These kernels find their tensors in a table."""


def short_name(mangled: str) -> str:
    """The last of the names that a mangled C++ name is made of, such as ``forward_in_registers``."""
    name, rest = "", mangled.removeprefix("_ZN")
    while found := re.match(r"\d+", rest):
        name, rest = rest[found.end() : found.end() + int(found[0])], rest[found.end() + int(found[0]) :]
    return name


class Kernels:
    """The compiled kernels behind launches.

    Args:
        *ops: whose CUDA kernels are wanted; none: of all.
    """

    def __init__(self, *ops: str) -> None:
        self._cuda: dict[str, tuple[str, Kernel]] = {}
        self._triton: dict[str, Kernel] = {}
        for op, path in recording.cuda_objects(*ops):
            self._cuda |= {name: (f"{op}.{short_name(name)}", kernel) for name, kernel in disassemble(path).items()}

    def __call__(self, launch: Launch) -> tuple[str, Kernel]:
        """The name, such as ``swoosh.forward``, and the kernel of a launch of Triton's or CUDA's."""
        if launch.kind == "cuda":
            return self._cuda[launch.name]
        key = launch.compiled.hash
        if key not in self._triton:
            self._triton[key] = disassemble_cubin(launch.compiled.asm["cubin"])
        return launch.name, self._triton[key]


COPIES = ("attention.pack_kernel",)
"""Kernels of attention that know the sizes of scores and make none."""


def scores_of(launch: Launch) -> int:
    """Scores that an attention kernel turns into weights: one for each target, source, sequence and head.

    Triton's launches tell, and CUDA's that are given weights; of others it is 0.
    """
    n = launch.numbers
    if launch.kind == "cuda":
        weights = n.get("weights")
        return 0 if weights is None else weights.targets * weights.sources * weights.sequences * weights.heads
    if "S" not in n or "H" not in n or launch.name in COPIES:
        return 0
    return (block_of_targets(n) if "targets" in n else n["T"]) * n["S"] * n["B"] * n["H"]


def floor(moved: int, scores: int, machine: Machine) -> float:
    """Seconds below which no kernel gets: its bytes at the copy rate, an exponential for each score, or a launch."""
    return max(machine.moved(moved), machine.cycles(scores / 32 / dict(machine.rates)["mufu"]), machine.launch)


def counted(launch: Launch, kernels: Kernels, elements: int) -> dict[str, Any]:
    """The row of one launch of Triton's or CUDA's: counts, predictions and floors.

    Args:
        launch: as recorded.
        kernels: the compiled ones.
        elements: of the op; instructions are given for each, or for each score where the kernel makes scores.
    """
    name, kernel = kernels(launch)
    often = executed(name, launch.kind == "cuda", kernel, launch.numbers | {"grid": launch.grid})
    moved = ADAM_BYTES[name] * elements if name in ADAM_BYTES else launch.bytes
    static = kernel.shared if launch.kind == "cuda" else 0  # Triton's number is the whole
    shared = launch.shared + static
    work = work_of(kernel, often, launch.blocks, launch.threads, launch.shared - kernel.shared + static, moved)
    scores = scores_of(launch)
    accesses = Counter()
    for one, count in often.items():
        if one.global_bytes and count > 0:
            accesses[f"{one.opcode.split('.')[0]} {one.global_bytes}"] += round(count)
    return {
        "kernel": name,
        "backend": launch.kind,
        "blocks": launch.blocks,
        "threads": launch.threads,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared": shared,
        "warps": work.warps * resident_blocks(kernel.registers, launch.threads, shared),
        "executed": round(32 * work.warps * work.blocks * work.instructions),
        "instructions": round(32 * work.warps * work.blocks * work.instructions / (scores or elements), 1),
        "of": "score" if scores else "element",
        "matrix_flops": round(work.warps * work.blocks * work.matrix_flops),
        "pipes": {pipe: round(count, 1) for pipe, count in work.pipes.items() if count},
        "accesses": dict(sorted(accesses.items())),
        "bytes": moved,
        "predicted_us": {m.name: round(1e6 * predicted(work, m)[0], 2) for m in MACHINES},
        "bound": {m.name: predicted(work, m)[1] for m in MACHINES},
        "floor_us": {m.name: round(1e6 * floor(moved, scores, m), 2) for m in MACHINES},
    }


def torch_time(launch: Launch, machine: Machine) -> float:
    """Seconds of one of PyTorch's own operations: its bytes at the copy rate, or its products, or a launch."""
    return max(machine.moved(launch.bytes), machine.multiplied(launch.flops), machine.launch)


# ---- ops ----


def op_rows(native: ModuleType, kernels: Kernels, step: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A row for each op, case, backend and direction, with the rows of its kernels.

    Args:
        native: the module that `recording.build_module` made.
        kernels: the compiled ones.
        step: called with the name of what is done next.
    """
    for name in OPS:
        op = ops.get(name)
        for case in cases_of(name):
            step(f"{name}, {case.name}")
            for backend in (b for b in BACKENDS if b in op.backends):
                for direction, launches, args in both_ways(native, op, op.backends[backend], case):
                    yield op_row(name, case, backend, direction, launches, args, kernels)
    step("scaled_adam, all parameters of L")
    for backend in BACKENDS:
        yield adam_row(native, kernels, backend)


def cases_of(name: str) -> list[Case]:
    """The cases of an op at preset L's stacks, or between them."""
    found = ops.cases_of(name)
    return [case for case in found if case.name in STACKS or (case.large and case.name.startswith(BETWEEN))]


def dtype_of(name: str) -> torch.dtype:
    """What the model calls an op on under bfloat16 autocast."""
    return torch.float32 if name in RESIDUAL_OPS else torch.bfloat16


def both_ways(native: ModuleType, op: Any, launchers: Any, case: Case) -> Iterator[tuple[str, list[Launch], tuple]]:
    """The launches of an op's forward and backward pass, and its arguments."""
    with recording.recording(native) as launches, torch.no_grad():
        args = case.inputs(dtype_of(op.name), "cpu")
        launches.clear()
        results = launchers.forward(*args)
        yield "forward", list(launches), args
        launches.clear()
        saved = op._to_store(args, results)[len(op.saved) :]
        kept = op._arguments([args[i] for i in op.saved], op._values(args))
        needs = tuple(args[i] is not None and args[i].requires_grad for i in op.tensors)
        launchers.backward(needs, results[: op.outputs], saved, *kept)
        yield "backward", list(launches), args


def op_row(
    name: str, case: Case, backend: str, direction: str, launches: list[Launch], args: tuple, kernels: Kernels
) -> dict[str, Any]:
    """The row of one op, case, backend and direction."""
    dtype = dtype_of(name)
    elements = next(x for x in args if isinstance(x, Tensor)).numel()
    own = [launch for launch in launches if launch.kind != "torch"]
    others = [launch for launch in launches if launch.kind == "torch"]
    moved = case.bytes(dtype.itemsize)[direction]
    scores = 0
    if name in ATTENTION:
        q, k = args[:2]
        scores = k.shape[0] * q.shape[:3].numel()
    rows = [counted(launch, kernels, elements) for launch in own]
    products = {m.name: m.multiplied(sum(launch.flops for launch in others)) for m in MACHINES}
    return {
        "op": name,
        "case": case.name,
        "backend": backend,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": moved,
        "moved": sum(launch.bytes for launch in launches),
        "flops": case.flops[direction],
        "kernels": rows,
        "torch": len(others),
        "predicted_us": {
            m.name: round(
                sum(row["predicted_us"][m.name] for row in rows) + 1e6 * sum(torch_time(x, m) for x in others), 1
            )
            for m in MACHINES
        },
        "floor_us": {m.name: round(1e6 * max(floor(moved, scores, m), products[m.name]), 1) for m in MACHINES},
    }


def adam_row(native: ModuleType, kernels: Kernels, backend: str) -> dict[str, Any]:
    """The row of an optimizer step over all parameters of L."""
    stepper = importlib.import_module("zipformer_kernels.ops.scaled_adam")._op.backends[backend]
    (case,) = (case for case in ADAM_CASES if case.name == "all parameters of L")
    with recording.recording(native) as launches:
        (groups,) = case.inputs(torch.float32, "cpu")
        launches.clear()
        stepper.step(groups, None, None, None, {})
        recorded = list(launches)
    elements = sum(p.numel() for p in groups[0].params)
    rows = [counted(launch, kernels, elements) for launch in recorded if launch.kind != "torch"]
    return {
        "op": "scaled_adam",
        "case": case.name,
        "backend": backend,
        "direction": "step",
        "dtype": "float32",
        "bytes": case.bytes(4)["step"],
        "flops": case.flops["step"],
        "kernels": rows,
        "torch": sum(launch.kind == "torch" for launch in recorded),
        "predicted_us": {m.name: round(sum(row["predicted_us"][m.name] for row in rows), 1) for m in MACHINES},
        "floor_us": {m.name: round(1e6 * floor(case.bytes(4)["step"], 0, m), 1) for m in MACHINES},
    }


# ---- the model ----


WORK = ("inference", "training", "training, undrawn")


def encoder_launches(native: ModuleType, peer: str, work: str) -> list[Launch]:
    """The launches of preset L's encoder on 30 x 30 s under bfloat16 autocast, forward, and backward in training.

    Backends are chosen as on a GPU. In training chances fall as they do after 10,000 steps, with seed 0; undrawn means
    that none does: no Balancer acts, no Whiten, no penalty.
    """
    training = work != "inference"
    encoder = encoder_of(peer).train(training).requires_grad_(training)
    for part in encoder.modules():
        if hasattr(part, "batch_count"):
            part.batch_count = models.BATCH_COUNT
        if hasattr(part, "min_prob"):
            part.prob = part.min_prob  # of a Whiten that has looked and found nothing to change
    models.seed(0)
    x = torch.empty(FRAMES, BATCH, 192, requires_grad=training)
    lengths = torch.full((BATCH,), FRAMES)
    chances = mock.patch("random.random", return_value=1.0) if work.endswith("undrawn") else contextlib.nullcontext()
    with recording.recording(native) as launches, chances:
        with recording.autocast():
            y = encoder(x, lengths, torch.zeros(BATCH, FRAMES, dtype=torch.bool))[0]
        if training:
            y.sum().backward()
        return list(launches)


def encoder_of(peer: str) -> nn.Module:
    """A peer's encoder of preset L; its numbers do not matter."""
    return models.encoder(peer, "L")


def category(launch: Launch) -> str:
    """The row of the table of the whole model that a launch counts in."""
    if launch.of_scores:
        return "attention, by PyTorch"
    if launch.kind != "torch":
        return "own kernels"
    if launch.flops:
        return "products"
    return "casts" if launch.name == "_to_copy" else "other passes of PyTorch"


def model_row(native: ModuleType, kernels: Kernels, peer: str, work: str) -> dict[str, Any]:
    """Predicted milliseconds of the encoder, by category, and of its own kernels, by name."""
    launches = encoder_launches(native, peer, work)
    milliseconds: dict[str, Counter[str]] = {m.name: Counter() for m in MACHINES}
    count, moved, shortest, multiplied = Counter(), Counter(), Counter(), 0
    own: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    cache: dict[Any, dict[str, Any]] = {}
    for launch in launches:
        if launch.kind == "torch":
            name = category(launch)
            times = {m.name: 1e3 * torch_time(launch, m) for m in MACHINES}
        else:
            key = launch.kind, launch.name, launch.grid, launch.bytes, repr(sorted(shape_numbers(launch).items()))
            if key not in cache:
                cache[key] = counted(launch, kernels, elements=1)
            row = cache[key]
            name = row["kernel"].split(".")[0]
            own[row["kernel"], launch.kind].append(row)
            multiplied += row["matrix_flops"] if name == "products" else 0
            times = {machine: us / 1e3 for machine, us in row["predicted_us"].items()}
        count[name] += 1
        moved[name] += launch.bytes
        for machine, ms in times.items():
            milliseconds[machine][name] += ms
        shortest.update({m.name: 1 for m in MACHINES if times[m.name] <= 1e3 * m.launch})
    return {
        "peer": peer,
        "work": work,
        "launches": dict(count),
        "shortest": dict(shortest),
        "bytes": dict(moved),
        "flops": sum(launch.flops for launch in launches) + multiplied,
        "predicted_ms": {m: {name: round(ms, 3) for name, ms in row.items()} for m, row in milliseconds.items()},
        "kernels": [kernel_sum(*key, rows) for key, rows in own.items()],
    }


def shape_numbers(launch: Launch) -> dict[str, Any]:
    """What of a launch's numbers decides its counts: addresses do not."""
    small = {name: x for name, x in launch.numbers.items() if not isinstance(x, int) or x < 1 << 32}
    if launch.kind == "cuda":
        return small | {"kernel": launch.name}
    return {name: x for name, x in small.items() if isinstance(x, int)} | {"hash": launch.compiled.hash}


def kernel_sum(name: str, kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Launches of one kernel in the model: how often, and predicted milliseconds beside the floor."""
    return {
        "kernel": name,
        "backend": kind,
        "launches": len(rows),
        "predicted_ms": {m.name: round(sum(r["predicted_us"][m.name] for r in rows) / 1e3, 3) for m in MACHINES},
        "floor_ms": {m.name: round(sum(r["floor_us"][m.name] for r in rows) / 1e3, 3) for m in MACHINES},
        "bound": {m.name: Counter(r["bound"][m.name] for r in rows).most_common(1)[0][0] for m in MACHINES},
    }
