"""Counts the kernel launches of one encoder layer, upstream's and ours, without a GPU.

``python benchmarks/launches.py [--output FILE]`` runs a layer as on a GPU, without computing anything
(`benchmarks.gpu.recording`): forward in eval mode, and forward and backward in training under one seed, in float32 and
under bfloat16 autocast. It lists PyTorch's operations that compute something (views, allocations and what is asked of
the host do not; each of the others is at least one launch), and launches of Triton's and CUDA's kernels, by name.
Both models take the same random decisions, so that the difference is the kernels'. Prints how many there are, and
writes JSON, of which `benchmarks.gpu.launch_tables` makes the tables in docs/gpu.md. Needs nvcc.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import recording  # noqa: E402
from benchmarks.gpu.counts import short_name  # noqa: E402
from benchmarks.gpu.recording import Launch  # noqa: E402
from benchmarks.harness import upstream  # noqa: E402
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
WORK = {"eval, forward": False, "training, forward and backward": True}
DTYPES = {"float32": contextlib.nullcontext, "bfloat16 autocast": recording.autocast}


def measure(layer: torch.nn.Module, backward: bool, dtype: str, native: ModuleType | None) -> dict[str, Any]:
    """Launches of one call of the layer, and of its backward if wanted.

    Args:
        layer: with numbers that do not matter; its copy is run, for modules remember what they measured.
        backward: whether to train.
        dtype: of `DTYPES`.
        native: the module that holds the CUDA kernels, or None for Triton's alone.
    """
    random.seed(0)
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).train(backward).requires_grad_(backward)
    padding = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [FRAMES - 4]])
    x = torch.randn(FRAMES, BATCH, LAYER["embed_dim"], requires_grad=backward)
    position = torch.randn(1, 2 * FRAMES - 1, LAYER["pos_dim"])
    grad = torch.randn(FRAMES, BATCH, LAYER["embed_dim"])
    with recording.recording(native) as launches, torch.set_grad_enabled(backward):
        with DTYPES[dtype]():
            y = layer(x, position, src_key_padding_mask=padding)
        count = len(launches)
        if backward:
            y.backward(grad)
    kinds = Counter(launch.kind for launch in launches)
    return {
        "operations": kinds["torch"],
        "kernels": kinds["triton"] + kinds["cuda"],
        "launches": kinds.total(),
        "forward": by_name(launches[:count]),
        "backward": by_name(launches[count:]),
    }


def by_name(launches: list[Launch]) -> dict[str, int]:
    """How often each is launched, the most frequent first."""
    return dict(Counter(map(name_of, launches)).most_common())


def name_of(launch: Launch) -> str:
    """As it stands in the list: ``torch.addmm``, ``swoosh.forward_kernel``, ``swoosh_forward: forward``."""
    if launch.kind == "torch":
        return f"torch.{launch.name}"
    return launch.name if launch.kind == "triton" else f"{launch.call}: {short_name(launch.name)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/launches.json")
    output = parser.parse_args().output
    native = recording.load_module(recording.build_module())
    torch.manual_seed(0)
    (module,) = upstream.load("zipformer")
    with upstream.activations(compiled=False):
        theirs, ours = module.ZipformerEncoderLayer(**LAYER), ZipformerEncoderLayer(**LAYER)
    results = {}
    for work, backward in WORK.items():
        for dtype in DTYPES:
            results[f"{work}, {dtype}"] = {
                "upstream": measure(theirs, backward, dtype, None),
                "ours, Triton": measure(ours, backward, dtype, None),
                "ours": measure(ours, backward, dtype, native),
            }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"layer": LAYER, "torch": torch.__version__, "results": results}, indent=1) + "\n")
    for name, row in results.items():
        counts = {
            peer: (sum(found["forward"].values()), sum(found["backward"].values())) for peer, found in row.items()
        }
        print(f"{name}: " + ", ".join(f"{peer} {f} + {b} = {f + b}" for peer, (f, b) in counts.items()))


if __name__ == "__main__":
    main()
