"""A model of how long a kernel takes on a GPU: the longest of a few bounds, each of one line.

It knows nothing of caches, bank conflicts and the order of instructions. Take its times as +-30%, ratios as firmer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from benchmarks.gpu.sass import PIPES, Instruction, Kernel


@dataclass(frozen=True)
class Machine:
    """What the model knows of a GPU.

    Attributes:
        name: of the GPU.
        copy_rate: bytes a second that a copy kernel reads and writes; measured ones, 90% of the data sheet's.
        multiprocessors: each with four schedulers.
        clock: hertz under load.
        matrix_flops: of the multiprocessor's tensor cores, bfloat16, a cycle.
        reached: the share of `matrix_flops` that torch's products of these sizes reach.
        issued: instructions of warps a cycle that a multiprocessor issues at best in real code, of four possible.
        single: the same of one warp alone: an instruction every four cycles. It is what a dependent one waits.
        rates: instructions of warps a cycle, by pipe.
        latency: cycles until what a loop iteration loads from memory is there.
        launch: seconds that the shortest kernel takes.
        registers, shared, warps, blocks: of a multiprocessor; registers of 32 bits, shared memory in bytes.
    """

    name: str
    copy_rate: float
    multiprocessors: int = 132
    clock: float = 1.755e9
    matrix_flops: int = 4096
    reached: float = 0.55
    issued: float = 3.0
    single: float = 0.25
    rates: tuple[tuple[str, float], ...] = (("fma", 4), ("alu", 2), ("lsu", 1), ("mufu", 0.5), ("fp64", 2))
    latency: int = 500
    launch: float = 3e-6
    registers: int = 65536
    shared: int = 228 * 1024
    warps: int = 64
    blocks: int = 32

    def cycles(self, count: float) -> float:
        """Seconds that all multiprocessors together need for `count` cycles of one."""
        return count / (self.multiprocessors * self.clock)

    def moved(self, count: float) -> float:
        """Seconds to move so many bytes."""
        return count / self.copy_rate

    def multiplied(self, flops: float) -> float:
        """Seconds of torch's products of so many FLOPs in bfloat16."""
        return self.cycles(flops / (self.matrix_flops * self.reached))


H100 = Machine("H100", 3.0e12)
H200 = Machine("H200", 4.3e12)
MACHINES = (H100, H200)

TARGETS = {"8.0": replace(H100, name="A100", shared=164 * 1024), "9.0": H100, "10.0": replace(H100, name="B200")}
"""By compute capability, as far as `resident_blocks` looks."""


def resident_blocks(registers: int, threads: int, shared: int, machine: Machine = H100) -> int:
    """Blocks that a multiprocessor holds at a time.

    Registers are handed out to warps 256 at a time, a quarter of them belongs to each scheduler; shared memory 128
    bytes at a time, of which every block costs 1024 more.

    Args:
        registers: of a thread.
        threads: of a block.
        shared: bytes of a block, static and dynamic.
    """
    warps = -(-threads // 32)
    of_warp = max(1, -(-registers // 8)) * 256
    by_registers = machine.registers // 4 // of_warp * 4 // warps
    by_shared = machine.shared // (-(-(shared + 1024) // 128) * 128)
    return max(1, min(machine.blocks, machine.warps // warps, by_registers, by_shared))


@dataclass(frozen=True)
class Work:
    """What a launch asks of a GPU.

    Attributes:
        blocks: in all.
        warps: of a block.
        resident: blocks that a multiprocessor holds.
        pipes: instructions that a warp executes, by pipe.
        matrix_flops: of a warp.
        rounds: how often a warp waits for memory.
        bytes: that must pass through memory.
    """

    blocks: int
    warps: int
    resident: int
    pipes: Counter[str]
    matrix_flops: float
    rounds: float
    bytes: int

    @property
    def instructions(self) -> float:
        """That a warp executes."""
        return sum(self.pipes.values())


def work_of(kernel: Kernel, executed: Counter[Instruction], blocks: int, threads: int, shared: int, moved: int) -> Work:
    """What a launch asks of a GPU.

    Args:
        kernel: the compiled kernel.
        executed: how often a warp executes each instruction.
        blocks, threads: of the launch.
        shared: dynamic shared memory of a block, bytes.
        moved: bytes that must pass through memory.
    """
    pipes: Counter[str] = Counter(dict.fromkeys(PIPES, 0.0))
    for one, often in executed.items():
        pipes[one.pipe] += often
    loads = [often for one, often in executed.items() if one.global_bytes and one.opcode.startswith("LD")]
    return Work(
        blocks=blocks,
        warps=-(-threads // 32),
        resident=resident_blocks(kernel.registers, threads, kernel.shared + shared),
        pipes=pipes,
        matrix_flops=sum(one.matrix_flops * often for one, often in executed.items()),
        rounds=max(loads, default=0.0),
        bytes=moved,
    )


def bounds(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds that each bound allows at least; the longest is the prediction.

    ``memory``: bytes at the copy rate. ``issue``: all instructions at the best rate. A pipe's name: its instructions at
    its rate. ``tensor``: the matrix instructions. ``latency``: what one warp needs for itself, times the rounds of
    blocks that follow each other where not all are resident: it binds where few warps fit. ``launch``: the shortest
    launch.
    """
    warps = work.blocks * work.warps
    waves = max(1.0, work.blocks / (machine.multiprocessors * work.resident))
    found = {
        "memory": machine.moved(work.bytes),
        "issue": machine.cycles(warps * work.instructions / machine.issued),
        "tensor": machine.cycles(warps * work.matrix_flops / machine.matrix_flops),
        "latency": waves * (work.instructions / machine.single + work.rounds * machine.latency) / machine.clock,
        "launch": machine.launch,
    }
    found |= {pipe: machine.cycles(warps * work.pipes[pipe] / rate) for pipe, rate in machine.rates}
    return found


def predicted(work: Work, machine: Machine) -> tuple[float, str]:
    """Seconds, and which bound they come from."""
    found = bounds(work, machine)
    name = max(found, key=found.__getitem__)
    return found[name], name
