"""Reads compiled GPU kernels: their instructions by pipe, their loops, their registers and spills.

The text is that of ``cuobjdump -sass`` and ``cuobjdump -res-usage``, which Triton's package and CUDA's toolkit bring.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
_USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_MATRIX = re.compile(r"(?:HMMA\.(16)(8)(16|8)|HGMMA\.(\d+)x(\d+)x(\d+))")

_PIPES = (
    ("tensor", r"[HIBQ]?G?MMA|HGMMA"),
    ("mufu", r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV|I2FP(?=\.F64)"),
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)"),
    ("fma", r"F(ADD|MUL|FMA|SWZADD)|HFMA2|HADD2|HMUL2|IMAD"),
    ("lsu", r"LDG|STG|LDS|STS|LDSM|STSM|LD|ST|LDL|STL|LDGSTS|ATOM\w*|RED|SHFL|UTMA\w*|LDC"),
    (
        "control",
        r"BRA|BRX|BSSY|BSYNC|BREAK|CALL|RET|EXIT|WARPSYNC|BAR|NOP|DEPBAR|LDGDEPBAR|YIELD|MEMBAR|ERRBAR|WARPGROUP",
    ),
    ("uniform", r"U[A-Z]\w*|R2UR|S2UR|VOTEU"),
)
_PIPE_OF = [(name, re.compile(f"(?:{pattern})$")) for name, pattern in _PIPES]
PIPES = (*(name for name, _ in _PIPES), "alu")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its opcode with modifiers, such as ``LDG.E.128``, and its operands."""

    address: int
    opcode: str
    operands: str

    @property
    def pipe(self) -> str:
        """The execution unit: one of `PIPES`; what no other takes goes to ``alu``."""
        stem = self.opcode.split(".")[0]
        return next((name for name, pattern in _PIPE_OF if pattern.match(stem)), "alu")

    @property
    def global_bytes(self) -> int:
        """Bytes that a thread moves from or to global memory; 0 if it moves none."""
        stem, *modifiers = self.opcode.split(".")
        if stem not in ("LDG", "STG", "LDGSTS", "LD", "ST"):  # the last two by a pointer from a table
            return 0
        return next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4)

    @property
    def matrix_flops(self) -> int:
        """FLOPs of a matrix instruction by one warp; a warpgroup's count a quarter for each of its four warps."""
        found = _MATRIX.match(self.opcode)
        if not found:
            return 0
        m, n, k = (int(size) for size in found.groups() if size)
        return 2 * m * n * k // (4 if self.opcode.startswith("HGMMA") else 1)

    @property
    def goes_to(self) -> int | None:
        """The address that the operands end in, or None: of a branch or a call, where it goes."""
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def target(self) -> int | None:
        """Where a branch goes, or None."""
        return self.goes_to if self.opcode.split(".")[0] == "BRA" else None


@dataclass(frozen=True)
class Loop:
    """Instructions from `first` to `last`, both included, of a kernel; `depth` loops lie around them."""

    first: int
    last: int
    depth: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: as the binary has it.
        instructions: in the order of their addresses.
        registers: of a thread.
        shared: static shared memory of a block, bytes.
        spills: bytes of stack and local memory of a thread.
    """

    name: str
    instructions: tuple[Instruction, ...]
    registers: int
    shared: int
    spills: int

    @cached_property
    def main(self) -> tuple[Instruction, ...]:
        """The instructions in front of the subroutines, which are slow paths of divisions and roots, and of padding."""
        called = [one.goes_to for one in self.instructions if one.opcode.startswith("CALL")]
        end = min((address for address in called if address is not None), default=None)
        before = [one for one in self.instructions if end is None or one.address < end]
        while before and before[-1].opcode in ("NOP", "BRA") and before[-1].target in (None, before[-1].address):
            before.pop()
        return tuple(before)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Loops, outer ones first: from the target of a branch backwards to the last such branch to it.

        Two that overlap without one holding the other are one loop with two entries.
        """
        place = {one.address: i for i, one in enumerate(self.main)}
        ends: dict[int, int] = {}
        for i, one in enumerate(self.main):
            begin = place.get(one.target, i)
            if begin < i:
                ends[begin] = i
        spans: list[tuple[int, int]] = []
        for first, last in sorted(ends.items()):
            for k, (begin, end) in enumerate(spans):
                if first <= end < last:
                    spans[k] = begin, last
                    break
            else:
                spans.append((first, last))
        return tuple(Loop(first, last, sum(f <= first and last <= e for f, e in spans) - 1) for first, last in spans)

    @cached_property
    def rare(self) -> frozenset[int]:
        """The places of the few instructions around each call of a subroutine, which a branch in front skips."""
        found: set[int] = set()
        for i, one in enumerate(self.main):
            if not one.opcode.startswith("CALL"):
                continue
            for j in range(i - 1, max(-1, i - 16), -1):
                target = self.main[j].target
                if target is not None and target > one.address:
                    found |= {k for k in range(j + 1, len(self.main)) if self.main[k].address < target}
                    break
        return frozenset(found)

    @cached_property
    def skipped(self) -> tuple[range, ...]:
        """The places that each branch forward skips."""
        place = {one.address: i for i, one in enumerate(self.main)}
        ends = ((i, place.get(one.target, i)) for i, one in enumerate(self.main))
        return tuple(range(i + 1, end) for i, end in ends if end > i + 1)

    def body(self, places: Iterable[int]) -> Counter[str]:
        """The opcodes at some places, with and without modifiers."""
        opcodes = (self.main[i].opcode for i in places)
        return Counter(name for opcode in opcodes for name in {opcode, opcode.split(".")[0]})

    def executed(
        self, trips: Callable[[int], float], skips: Callable[[Counter[str]], bool] = lambda _: False
    ) -> Counter[Instruction]:
        """How often a warp executes each instruction; branches forward are taken to be not taken.

        Args:
            trips: how often the loop with this number, of `loops`, runs each time that it is reached.
            skips: whether a branch forward is taken, by the `body` of what it skips.
        """
        rare = self.rare.union(*(places for places in self.skipped if skips(self.body(places))))
        often = [0.0 if i in rare else 1.0 for i in range(len(self.main))]
        for number, loop in enumerate(self.loops):
            times = trips(number)
            for i in range(loop.first, loop.last + 1):
                often[i] *= times
        return Counter(dict(zip(self.main, often, strict=True)))


def disassemble(binary: Path, target: str = "sm_90") -> dict[str, Kernel]:
    """The kernels for one target in an object or library, by name."""
    return parse(*(_run("-arch", target, option, binary) for option in ("-sass", "-res-usage")))


def disassemble_cubin(cubin: bytes) -> Kernel:
    """The one kernel of a cubin, for whatever it was compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (kernel,) = parse(*(_run(option, file.name) for option in ("-sass", "-res-usage"))).values()
    return kernel


def parse(text: str, usage: str) -> dict[str, Kernel]:
    """The kernels of what ``cuobjdump -sass`` and ``cuobjdump -res-usage`` print, by name."""
    numbers = {name: tuple(map(int, found)) for name, *found in _USAGE.findall(usage)}
    kernels = {}
    for name, body in _functions(text):
        registers, stack, shared, local = numbers[name]
        instructions = tuple(
            Instruction(int(address, 16), opcode, operands.strip())
            for address, opcode, operands in _INSTRUCTION.findall(body)
        )
        kernels[name] = Kernel(name, instructions, registers, shared, stack + local)
    return kernels


def _functions(text: str) -> Iterator[tuple[str, str]]:
    _, *parts = re.split(r"\n\s*Function : ", text)
    for part in parts:
        name, _, body = part.partition("\n")
        yield name.strip(), body


def _run(*arguments: str | Path) -> str:
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True).stdout
