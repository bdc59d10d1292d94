"""Launches a small kernel by `zipformer_kernels.core.jit` and by Triton, compiled for sm_90, with nothing to run on.

``python tests/jit_launches.py`` prints one JSON line for each call: the compiled kernels that Triton itself chose, and
that ours chose at the first and the second launch, by their hashes; and what the second launch handed to the driver.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parent.parent))

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu.pretending import Compiler
from zipformer_kernels.core.jit import Kernel, jit


def add(x_ptr, y_ptr, free_ptr, n, rows, scale, mask_ptr, WIDTH: tl.constexpr, FLAG: tl.constexpr = False):
    """Something that depends on all of its arguments."""
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32) * scale
    if mask_ptr is not None:
        x = tl.where(tl.load(mask_ptr + i, mask=i < n, other=0) != 0, 0.0, x)
    if FLAG:
        x += tl.load(free_ptr + i * rows, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i * n, x.to(y_ptr.dtype.element_ty), mask=i < n)


OPTIONS = {"do_not_specialize": ["rows"], "do_not_specialize_on_alignment": ["free_ptr"]}
ours, theirs = jit(add, **OPTIONS), triton.jit(add, **OPTIONS)


class Recorder(Compiler):
    """Keeps what is handed to it last; devices and streams have the numbers that are set."""

    device, stream, last = 0, 0, None

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 1000 * device + self.stream

    def launcher_cls(self, source, metadata):
        return lambda *args: setattr(self, "last", args)


def calls():
    """Names of calls, and their arguments."""
    memory = torch.zeros(64)
    x, y = memory[:16], memory[32:48]
    plain = {"x": x, "y": y, "free": x, "n": 16, "rows": 16, "scale": 0.5, "mask": None, "WIDTH": 16}
    changes = {
        "plain": {},
        "x is not aligned": {"x": memory[1:17]},
        "y is not aligned": {"y": memory[33:49]},
        "neither is": {"x": memory[1:17], "y": memory[33:49]},
        "nobody asks whether it is aligned": {"free": memory[1:17]},
        "half precision": {"x": x.bfloat16()},
        "both in half precision": {"x": x.bfloat16(), "y": y.bfloat16()},
        "other half": {"x": x.half()},
        "a parameter": {"x": torch.nn.Parameter(x.clone())},
        "a mask": {"mask": torch.zeros(16, dtype=torch.bool)},
        "a mask of bytes": {"mask": torch.zeros(16, dtype=torch.uint8)},
        "one": {"n": 1},
        "zero": {"n": 0},
        "odd": {"n": 15},
        "another odd number": {"n": 17},
        "negative": {"n": -16},
        "negative and odd": {"n": -3},
        "the largest of 32 bits": {"n": 2**31 - 1},
        "the least of 32 bits": {"n": -(2**31)},
        "of 64 bits": {"n": 2**31},
        "below 32 bits": {"n": -(2**31) - 1},
        "of 64 bits and odd": {"n": 2**40 + 1},
        "of 64 bits without sign": {"n": 2**63 + 16},
        "one where nobody asks": {"rows": 1},
        "odd where nobody asks": {"rows": 3},
        "64 bits where nobody asks": {"rows": 2**35},
        "an integer for a float": {"scale": 1},
        "another integer for a float": {"scale": 3},
        "truth for a float": {"scale": True},
        "another float": {"scale": 1.0},
        "another width": {"WIDTH": 8},
        "flag": {"FLAG": True},
        "flag, nobody asks": {"FLAG": True, "rows": 1},
        "a flag that is 1": {"FLAG": 1},
        "two warps": {"num_warps": 2},
        "five stages": {"num_stages": 5},
        "no fusion of products and sums": {"enable_fp_fusion": False},
    }
    for name, change in changes.items():
        named = plain | change
        tensors = {key + "_ptr": named.pop(key) for key in ("x", "y", "free", "mask")}
        yield name, tensors | named


def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def row(name, named):
    chosen = theirs[(3, 2)](**named)
    first, second = ours[(3, 2)](**named), ours[(3, 2)](**named)
    launched = driver.active.last
    wanted = [address(named.get(p.name, p.default)) for p in ours.params]
    return {
        "call": name,
        "triton": chosen.hash,
        "first": first.hash,
        "second": second.hash,
        "grid": launched[:3],
        "arguments": list(map(address, launched[9:])) == wanted,
        "forms": len(ours._compiled),
    }


def others():
    """What the second launch did under other circumstances."""
    recorder, named = driver.active, dict(calls())["plain"]
    plain = SimpleNamespace(**named)
    positional = plain.x_ptr, plain.y_ptr, plain.free_ptr, 16, 16, 0.5, None
    for device, stream in ((0, 7), (1, 0), (1, 8), (0, 0)):
        recorder.device, recorder.stream = device, stream
        kernels = [ours[(1,)](*positional, WIDTH=16) for _ in range(2)]
        yield {"device": device, "stream": recorder.last[3] - 1000 * device, "same": kernels[0] is kernels[1]}

    runtime, before = knobs.runtime, knobs.runtime.launch_enter_hook
    if before is None:  # before 3.5: one function
        runtime.launch_enter_hook = print
    else:
        before.add(print)
    ours[(1,)](*positional, WIDTH=16)
    called = recorder.last[7] is runtime.launch_enter_hook and recorder.last[6] is not None
    if before is None:
        runtime.launch_enter_hook = None
    else:
        before.remove(print)
    ours[(1,)](*positional, WIDTH=16)
    yield {"hook": called, "afterwards": recorder.last[7] is not None}

    run, shown = JITFunction.run, []
    JITFunction.run = lambda self, *args, **kwargs: shown.append((self, kwargs["grid"]))
    ours[(1,)](*positional, WIDTH=16)
    JITFunction.run = run
    yield {"replaced": shown == [(ours, (1,))]}

    ours.add_pre_run_hook(lambda *args, **named: shown.append("before"))
    ours[(1,)](*positional, WIDTH=16)
    yield {"before": shown[-1]}
    for wrong in ({}, {"WIDTH": 16, "WIDE": 3}, {"WIDTH": [16]}):
        errors = []
        for kernel in (ours, theirs):
            try:
                kernel[(1,)](*positional, **wrong)
            except Exception as error:
                errors.append(type(error).__name__)
        yield {"wrong": errors}


if __name__ == "__main__":
    if type(ours) is not Kernel:
        sys.exit("another Triton")
    driver.set_active(Recorder())
    for call in [*calls(), *calls()]:
        print(json.dumps(row(*call)))
    for seen in others():
        print(json.dumps(seen))
