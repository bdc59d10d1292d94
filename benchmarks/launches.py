"""Counts the kernel launches of one encoder layer, upstream's and ours, without a GPU.

``python benchmarks/launches.py [--output FILE]`` runs a layer forward in eval mode, and forward and backward in
training under one seed, and counts two things: PyTorch operations that compute something (views and allocations do not;
each of the others is at least one launch on a GPU), and launches of Triton kernels, which run interpreted here. Both
models take the same random decisions, so that the difference is the kernels'. Prints a table and writes JSON.
"""

import argparse
import contextlib
import json
import os
import random
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["TRITON_INTERPRET"] = "1"  # before the package is imported
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import interpreter  # noqa: E402
import upstream  # noqa: E402
from triton.runtime.interpreter import GridExecutor  # noqa: E402

from zipformer_kernels import use_backend  # noqa: E402
from zipformer_kernels.modules import ZipformerEncoderLayer  # noqa: E402

LAYER = {
    "embed_dim": 64,
    "pos_dim": 48,
    "num_heads": 4,
    "query_head_dim": 16,
    "pos_head_dim": 4,
    "value_head_dim": 12,
    "feedforward_dim": 64,
    "cnn_module_kernel": 15,
}
FRAMES, BATCH = 16, 2


class Launches(TorchDispatchMode):
    """Counts operations that compute, and launches of Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.kernels = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in operation._schema.returns
        )
        if not view and "empty" not in operation._schema.name:
            self.operations += 1
        return operation(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counting(self):
        """Within the block Triton's launches are counted; PyTorch inside the interpreter is not."""
        launch = GridExecutor.__call__

        def count(executor, *args, **kwargs):
            self.kernels += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return launch(executor, *args, **kwargs)

        GridExecutor.__call__ = count
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = launch

    def total(self) -> dict[str, int]:
        return {"operations": self.operations, "kernels": self.kernels, "launches": self.operations + self.kernels}


def measure(layer: torch.nn.Module, backward: bool) -> dict[str, int]:
    """Launches of one call of the layer, and of its backward if wanted."""
    random.seed(0)
    torch.manual_seed(0)
    # Nothing needs a gradient in eval, but grad mode stays on: without it modules take their way for CPUs.
    layer.train(backward).requires_grad_(backward)
    x = torch.randn(FRAMES, BATCH, LAYER["embed_dim"], requires_grad=backward)
    position = torch.randn(1, 2 * FRAMES - 1, LAYER["pos_dim"])
    padding = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [FRAMES - 4]])
    launches = Launches()
    masks = mock.patch("zipformer_kernels.modules.layer.keeps_all", return_value=False)  # a GPU's are not looked at
    with masks, launches.counting():
        y = layer(x, position, src_key_padding_mask=padding)
        if backward:
            y.sum().backward()
    return launches.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/launches.json")
    output = parser.parse_args().output
    interpreter.mend_bfloat16_dot()
    torch.manual_seed(0)
    theirs = upstream.zipformer.ZipformerEncoderLayer(**LAYER)
    ours = ZipformerEncoderLayer(**LAYER)
    ours.load_state_dict(theirs.state_dict())
    results = {}
    for name, backward in (("eval, forward", False), ("training, forward and backward", True)):
        with use_backend("triton"):
            fused = measure(ours, backward)
        results[name] = {"upstream": measure(theirs, backward), "ours": fused}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"layer": LAYER, "torch": torch.__version__, "results": results}, indent=1) + "\n")
    for name, row in results.items():
        print(f"{name}: upstream {row['upstream']['launches']}, ours {row['ours']['launches']} launches")


if __name__ == "__main__":
    main()
