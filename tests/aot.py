"""Compiles every Triton kernel that an op's launchers launch, ahead of time and without a GPU.

``python tests/aot.py OP [TARGET ...]`` runs the launchers of the op and of its variants, forward and backward, on CPU
tensors of their small cases, for each dtype and target, with a driver that reports the target and compiles instead of
launching. So kernels are compiled with just the specialisations that a launch would give them. An optimizer step is run
in place of forward and backward.
Prints one JSON line per compiled kernel: name, target, registers and spills, as read from the binary.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import zipformer_kernels.core.jit  # noqa: F401 it looks whether somebody replaces `JITFunction.run` after it
from zipformer_kernels import ops
from zipformer_kernels.core.op import Launchers, Op
from zipformer_kernels.ops.scaled_adam.stepper import Stepper

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class CompileOnly:
    """A Triton driver with one of `TARGETS`, and nothing to run on."""

    def __init__(self, name: str) -> None:
        self.target, self.device = TARGETS[name], list(TARGETS).index(name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(kernel: object, target: str) -> dict:
    """Registers and spilled bytes of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        number = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": number["vgpr_count"], "spills": number["vgpr_spill_count"]}
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    number = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": number["REG"], "spills": number["STACK"] + number["LOCAL"]}


def launch_both_ways(op: Op, launchers: Launchers, args: tuple) -> None:
    """Forward, and backward where it has one, of an op or a variant."""
    results = launchers.forward(*args)
    if launchers.backward is None:
        return
    saved = op._to_store(args, results)[len(op.saved) :]
    kept = op._arguments([args[i] for i in op.saved], op._values(args))
    needs = tuple(args[i] is not None and args[i].requires_grad for i in op.tensors)
    launchers.backward(needs, results[: op.outputs], saved, *kept)


def launch_step(stepper: Stepper, groups: list) -> None:
    """An optimizer step, of this process alone, and with a loss scale and other processes."""
    stepper.step(groups, None, None, None, {})
    stepper.step(groups, torch.ones(()), torch.zeros(()), lambda sums: None, {})


def compile_op(name: str, target: str) -> list[dict]:
    """Compiles the kernels of op `name` for a target of `TARGETS`; returns what `usage` says of each."""
    driver.set_active(CompileOnly(target))
    compiled.clear()
    general = importlib.import_module(f"zipformer_kernels.ops.{name}.triton").launchers
    variants = getattr(general, "variants", {})
    for full_name, launchers in {name: general, **{f"{name}.{key}": own for key, own in variants.items()}}.items():
        compile_launchers(full_name, launchers, target)
    return [{"kernel": kernel, "target": target, **usage(built, target)} for kernel, built in compiled.values()]


def compile_launchers(name: str, launchers: Launchers | Stepper, target: str) -> None:
    """Compiles what the launchers of an op or a variant launch."""
    op, small = ops.get(name), [case for case in ops.cases_of(name) if not case.large]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        every = (
            dtype == torch.bfloat16 and target == "sm_90"
        )  # elsewhere the first case has to do: compiling takes time
        for case in small if every else small[:1]:
            args = case.inputs(dtype, "cpu")
            if launchers.supports(*args) is not None:
                continue
            with torch.no_grad():
                if hasattr(launchers, "step"):
                    launch_step(launchers, *args)
                else:
                    launch_both_ways(op, launchers, args)


compiled: dict[str, tuple[str, object]] = {}
"""Name and kernel of what has been launched, by hash."""

launch = JITFunction.run


def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
    """In place of `JITFunction.run`."""
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    compiled[kernel.hash] = (self.fn.__name__, kernel)
    return kernel


if __name__ == "__main__":
    JITFunction.run = compile_only
    for target in sys.argv[2:] or TARGETS:
        for row in compile_op(sys.argv[1], target):
            print(json.dumps(row))
