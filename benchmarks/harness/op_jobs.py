"""Jobs of every op: its cases, in each direction, by each backend, the reference, and others' code."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.harness import peers
from benchmarks.harness.job import Job, off_by
from benchmarks.harness.machine import DEVICE, memory_bytes
from benchmarks.harness.others import OTHERS, UNCHECKED, Call
from benchmarks.harness.peers import Agreement, Prepared, Run, Unserved
from zipformer_kernels import ops
from zipformer_kernels.core import backend
from zipformer_kernels.ops.cases import Case

DIRECTIONS = ("forward", "backward", "both")
CPU_LIMITS = {"bytes": 4e8, "flops": 1.5e10}  # beyond that a case takes too long on a CPU
CHECKED_TO = {torch.float32: 50 * torch.finfo(torch.float32).eps, torch.bfloat16: 5e-2}
"""How far peers may be apart, as relative error. The reference in bfloat16, which rounds every step, is off by 1e-2."""

DTYPES = (torch.bfloat16,) if DEVICE.type == "cuda" else (torch.float32,)
"""What is timed: what models run in."""

RESIDUAL = ("bias_norm", "bypass")
"""Ops that under autocast get the sum of the residual stream, which stays in float32; they are timed in it too."""

DENSE = ("eager", "compiled", "upstream")
"""Peers that write down every pair of frames."""


def names() -> list[str]:
    """The ops that have a forward and a backward pass."""
    return [name for name in ops.names() if hasattr(ops.get(name), "reference")]


def cases_of(op: str, every: bool = False) -> list[Case]:
    """The cases of an op that this machine can time.

    Args:
        op: the name of the op, or of a variant, such as ``conv_module.stream``.
        every: all that are not empty, awkward ones too; or the first and the last of the large ones.
    """
    cases = [case for case in ops.cases_of(op) if case.large or (every and sum(case.flops.values()) > 0)]
    if DEVICE.type == "cpu":
        cases = [
            case
            for case in cases
            if sum(case.bytes(4).values()) <= CPU_LIMITS["bytes"] and sum(case.flops.values()) <= CPU_LIMITS["flops"]
        ]
    return cases if every else [*cases[:1], *cases[1:][-1:]]


def jobs(op: str, every: bool = False) -> Iterator[Job]:
    """The jobs of one op on this machine; of all its cases that fit, or of the first and the last."""
    for dtype in dict.fromkeys((*DTYPES, torch.float32) if op in RESIDUAL else DTYPES):
        for case in cases_of(op, every):
            for direction in DIRECTIONS if "backward" in case.flops else ("forward",):
                yield job(op, case, direction, dtype)


def job(op: str, case: Case, direction: str, dtype: torch.dtype = torch.float32) -> Job:
    """One case of an op in one direction."""
    sizes = case.bytes(dtype.itemsize)
    all_peers = (*backend.BACKENDS, "compiled", *OTHERS.get(op, {"upstream": None}))
    return Job(
        op,
        case.name,
        direction,
        dtype,
        all_peers,
        partial(prepare, op, case, direction, dtype),
        bytes=sum(sizes.values()) if direction == "both" else sizes[direction],
        flops=sum(case.flops.values()) if direction == "both" else case.flops[direction],
        graphs=() if direction == "backward" else all_peers,  # the forward pass lies outside of it
    )


def prepare(op: str, case: Case, direction: str, dtype: torch.dtype, wanted: Sequence[str]) -> Prepared:
    """Functions for the peers wanted, all on the same inputs, checked against the eager reference."""
    peers.free()
    torch.manual_seed(0)
    args = case.inputs(dtype, DEVICE)
    agreement = Agreement(off, CHECKED_TO[dtype], "eager")

    def make(peer: str) -> Run:
        if peer in DENSE:
            refuse_what_does_not_fit(case, dtype)
        function, its_args = call(op, peer, args)
        passes = Passes(function, its_args)
        if peer == "eager":
            passes.results()  # MKL's first exp on several threads can be off by 1e-4
        results = passes.results()
        if (op, peer) in UNCHECKED:
            agreement.unchecked[peer] = UNCHECKED[op, peer]
        else:
            agreement.check(peer, results, alike=its_args is args)
        return passes.run(direction)

    prepared = peers.prepare(dict.fromkeys(("eager", *wanted)), make, agreement)
    prepared.keep(wanted)
    return prepared


def refuse_what_does_not_fit(case: Case, dtype: torch.dtype) -> None:
    """Raises `Unserved` where all pairs of frames of a case are more than the memory there is."""
    held, there = case.dense(dtype.itemsize) if case.dense else 0, memory_bytes()
    if there is not None and held > there:
        raise Unserved(f"it would hold {held / 1e9:.0f} GB at once; there are {there / 1e9:.0f}")


def off(results: Sequence[Tensor], expected: Sequence[Tensor], alike: bool) -> float:
    """The largest relative error of an output and its gradients.

    Gradients of arguments that are laid out otherwise (joined, padded, permuted) are compared by their common norm,
    which no layout changes. One that vanishes but for rounding is held against all of them.
    """
    (output, *gradients), (wanted, *wanted_gradients) = results, expected
    whole = norm(wanted_gradients)
    if not alike:
        gradients, wanted_gradients = [norm(gradients)], [whole]
    errors = [off_by(output, wanted)]
    for actual, gradient in zip(gradients, wanted_gradients, strict=True):
        vanishes = gradient.norm() < torch.finfo(wanted.dtype).eps * whole
        errors.append(((actual - gradient).norm() / whole).item() if vanishes else off_by(actual, gradient))
    return torch.tensor(errors).max().item()  # NaN if any is


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together; 0 of none."""
    return torch.tensor([x.double().norm().item() for x in tensors], dtype=torch.double).norm()


def call(op: str, peer: str, args: tuple[Any, ...]) -> Call:
    """The function by which a peer computes an op, and its arguments. Raises `Unserved` where it cannot."""
    operation = ops.get(op)
    if peer == "compiled":
        reason = no_compiler()
        if reason is not None:
            raise Unserved(reason)
        torch.compiler.reset()
        torch._functorch.config.donated_buffer = False  # else a backward pass cannot be repeated, to be timed
        return torch.compile(operation.reference), args
    if peer not in backend.BACKENDS:
        make = OTHERS.get(op, {}).get(peer)
        if make is None:
            raise Unserved(f"{peer} has no function for it")
        return make(*args)
    if (peer == "triton" and backend.TRITON_INTERPRETS) or (peer == "cuda" and backend.emulated()):
        raise Unserved("it runs in a simulation here")
    reason = operation.unsupported(peer, *args)
    if reason is not None:
        raise Unserved(reason)
    return partial(operation, backend=peer), args


def no_compiler() -> str | None:
    """Why torch.compile cannot work here, or None if it can."""
    if DEVICE.type == "cuda":
        return backend.missing["triton"]
    return None if any(map(shutil.which, ("g++", "clang++"))) else "torch.compile finds no C++ compiler"


class Passes:
    """The forward and backward pass of a function on its arguments."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args
        self.leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        self.gradient: Tensor | None = None

    def output(self) -> Tensor:
        """The first output, with its graph."""
        outputs = self.function(*self.args)
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    def results(self) -> list[Tensor]:
        """The first output, and the gradients of all arguments for one fixed gradient of it, where it has some."""
        output = self.output()
        if not self.leaves:
            return [output]
        generator = torch.Generator(DEVICE).manual_seed(1)
        self.gradient = torch.randn(output.shape, generator=generator, device=DEVICE).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, self.leaves, self.gradient)]

    def run(self, direction: str) -> Callable[[], Any]:
        """One direction as a function without arguments."""
        if direction == "backward":
            output = self.output()
            return lambda: torch.autograd.grad(output, self.leaves, self.gradient, retain_graph=True)
        return {"forward": self.forward, "both": self.both}[direction]

    def forward(self) -> Any:
        """Without gradients."""
        with torch.no_grad():
            return self.function(*self.args)

    def both(self) -> Any:
        """Forward, then backward."""
        return torch.autograd.grad(self.output(), self.leaves, self.gradient)
