"""Compiles the Triton kernels of matrix products ahead of time, as layers of preset L would launch them.

``python tests/aot_products.py [TARGET ...]`` prints one JSON line per compiled kernel, as `tests/aot.py` does, with the
shared memory of a program, how many programs share a multiprocessor, matrix instructions, and whether sizes are odd:
then elements are read one by one.
"""

import json
import sys
from pathlib import Path

import torch
from aot import TARGETS, CompileOnly, compile_only, compiled, usage
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).parent.parent))  # where benchmarks/ is

from benchmarks.gpu import roofline, sass
from zipformer_kernels.branch.products import Dropout
from zipformer_kernels.branch.products import triton as products

CAPABILITY = {"sm_80": "8.0", "sm_90": "9.0", "sm_100": "10.0"}  # those whose multiprocessors `roofline` knows


def launch(low: torch.dtype, channels: int, hidden_channels: int, training: bool) -> None:
    """Every function, on a branch of so many channels; in inference those of forward alone."""
    frames, sequences, triton = 3, 2, products.TRITON
    x, hidden = (torch.empty(frames, sequences, size, dtype=low) for size in (channels, hidden_channels))
    first, last = torch.empty(hidden_channels, channels, dtype=low), torch.empty(channels, hidden_channels, dtype=low)
    src = torch.empty(frames, sequences, channels, dtype=torch.float32 if training else low)
    dropout = Dropout(torch.empty(1, sequences, hidden_channels, dtype=low), 0.1) if training else None
    chosen = torch.empty(sequences, 1) if training else None
    triton.activated(x, first, torch.empty(hidden_channels, dtype=low), dropout, "l", training)
    triton.added(src, hidden, last, torch.empty(channels, dtype=low), chosen, low)
    if training:
        triton.activated_gradient(x, last, hidden, dropout, "l")
        triton.added_gradient(src, hidden, first, low)
        triton.lowered(src, chosen, low)


def compile_for(target: str) -> list[dict]:
    """What is said of each kernel, for a target of `aot.TARGETS`."""
    driver.set_active(CompileOnly(target))
    compiled.clear()
    launch(torch.bfloat16, 256, 768, True)
    launch(torch.bfloat16, 192, 272, True)  # neither of them whole tiles
    if target == "sm_90":
        launch(torch.float16, 256, 768, True)
        launch(torch.bfloat16, 256, 768, False)
    even = set(compiled)
    if target == "sm_90":
        launch(torch.bfloat16, 19, 33, True)
    return [
        {"kernel": name, "target": target, "odd": key not in even, **said_of(kernel, target)}
        for key, (name, kernel) in compiled.items()
    ]


def said_of(kernel: object, target: str) -> dict:
    """As above."""
    found = usage(kernel, target) | {"shared": kernel.metadata.shared}
    if target in CAPABILITY:
        machine, threads = roofline.TARGETS[CAPABILITY[target]], 32 * kernel.metadata.num_warps
        found["programs"] = roofline.resident_blocks(found["registers"], threads, found["shared"], machine)
        opcodes = {one.opcode for one in sass.disassemble_cubin(kernel.asm["cubin"]).main}
        found["products"] = sorted(opcode for opcode in opcodes if "MMA." in opcode)
    return found


if __name__ == "__main__":
    JITFunction.run = compile_only
    for target in sys.argv[1:] or TARGETS:
        for row in compile_for(target):
            print(json.dumps(row))
