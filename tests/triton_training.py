"""Trains layers of preset L on CPU tensors with Triton's launchers, which launch nothing: no GPU is needed.

So kernels are asked for with the strides and the constants that the model has.

``python tests/triton_training.py forms`` compiles nothing. It prints one JSON line per training step: its name, and the
kernels of attention that it asks for in a form that no step before has asked for, which Triton would have to compile.

``python tests/triton_training.py kernels`` compiles for sm_90 what a step in bfloat16 and one in float32 ask for, and
prints one JSON line per kernel, as `tests/aot.py` does.
"""

import importlib
import json
import random
import sys
from pathlib import Path

import torch
from aot import CompileOnly, compile_only, compiled, usage
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import zipformer_kernels
from zipformer_kernels.core import backend
from zipformer_kernels.modules import CompactRelPositionalEncoding, ZipformerEncoderLayer
from zipformer_kernels.modules import attention as attention_module
from zipformer_kernels.modules import layer as layer_module
from zipformer_kernels.presets import preset

STEPS = {
    "first": {"frames": 48, "batch": 3},
    "again": {"frames": 48, "batch": 3},
    "penalty": {"frames": 48, "batch": 3, "penalty": True},
    "constant weights": {"frames": 48, "batch": 3, "constant": True},
    "other lengths": {"frames": 37, "batch": 5},
    "a multiple of 16, one sequence": {"frames": 64, "batch": 1, "penalty": True, "constant": True},
    "the third stack": {"stack": 2, "frames": 12, "batch": 3},
    "the fourth stack": {"stack": 3, "frames": 6, "batch": 3, "penalty": True, "constant": True},
}

asked: list[str] = []
"""Kernels of attention in the forms that a step asked for first."""


def offer_triton() -> None:
    """Puts Triton's launchers behind all ops, for tensors on the CPU."""
    for path in Path(zipformer_kernels.__file__).parent.glob("ops/*/triton.py"):
        package = f"zipformer_kernels.ops.{path.parent.name}"
        op = getattr(importlib.import_module(package), "_op", None)
        if op is not None:
            op.backends["triton"] = launchers = importlib.import_module(package + ".triton").launchers
            for name, variant in getattr(launchers, "variants", {}).items():
                op.variants[name].backends["triton"] = variant
    backend.TRITON_INTERPRETS = True
    backend.refresh()


def note(self: JITFunction, key: str, signature: dict, device: int, *_: object) -> object:
    """In place of `JITFunction._do_compile`."""
    if self.fn.__module__.startswith("zipformer_kernels.ops.attention."):
        asked.append(self.fn.__name__)
    kernel = self.device_caches[device][0][key] = object()
    return kernel


def layer_of(stack: int) -> ZipformerEncoderLayer:
    """A layer of a stack of preset L."""
    sizes = preset("L")
    dim, heads, hidden = (sizes[name][stack] for name in ("encoder_dim", "num_heads", "feedforward_dim"))
    per_head = (sizes[name] for name in ("query_head_dim", "pos_head_dim", "value_head_dim"))
    return ZipformerEncoderLayer(dim, sizes["pos_dim"], heads, *per_head, hidden)


def train(
    frames: int,
    batch: int,
    stack: int = 0,
    penalty: bool = False,
    constant: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward of a new layer, with what is drawn at random as the arguments say."""
    layer = layer_of(stack)
    attention_module.happens = lambda rate: penalty and rate == 0.1
    layer_module.happens = lambda rate: constant and rate is layer.const_attention_rate
    src = torch.randn(frames, batch, layer.embed_dim, requires_grad=True)
    padding = torch.zeros(batch, frames, dtype=torch.bool)
    padding[0, -1] = True
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = layer(src, CompactRelPositionalEncoding(preset("L")["pos_dim"], 0.0)(src), src_key_padding_mask=padding)
    out.sum().backward()


def print_forms() -> None:
    """What the steps of a training run ask for."""
    launch = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **kwargs: launch(self, *args, warmup=True, **kwargs)
    JITFunction._do_compile = note
    for name, step in STEPS.items():
        asked.clear()
        train(**step)
        print(json.dumps({"step": name, "kernels": sorted(asked)}))


def print_kernels() -> None:
    """Registers and spills of the kernels of all ops."""
    JITFunction.run = compile_only
    for dtype in (torch.bfloat16, torch.float32):
        train(**STEPS["first"], dtype=dtype)
    for name, kernel in compiled.values():
        print(json.dumps({"kernel": name, "target": "sm_90", **usage(kernel, "sm_90")}))


if __name__ == "__main__":
    driver.set_active(CompileOnly("sm_90"))
    offer_triton()
    random.seed(0)
    torch.manual_seed(0)
    with backend.use_backend("triton,eager"):
        {"forms": print_forms, "kernels": print_kernels}[sys.argv[1]]()
