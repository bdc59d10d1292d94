"""Measures the time that the host needs for an encoder layer on a GPU, upstream's and ours, without a GPU.

``python benchmarks/host.py [--rounds N] [--output FILE] [--profile PEER]`` calls a layer with launchers that do
nothing: tiny tensors of the CPU stand for a GPU's (`benchmarks.gpu.pretending`). PyTorch's operations run on them: to
dispatch and compute one takes about as long as to launch it. Triton's launchers and those of CUDA kernels return at
once. What remains is Python, autograd and PyTorch's dispatcher: the time below which no GPU can bring a layer, however
fast it is.

Both layers are called by turns, on one thread, under the same seeds, forward in eval mode, and forward and backward in
training, in float32 and under bfloat16 autocast. Counts beside the times say where they go: of PyTorch's operations,
views and allocations among them, of launches, of autograd's nodes, and of functions called in Python and from it, all
of one call under seed 0. Needs nvcc.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import json
import pstats
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import recording  # noqa: E402
from benchmarks.gpu.pretending import as_on_a_gpu  # noqa: E402
from benchmarks.harness import machine, models, upstream  # noqa: E402
from zipformer_kernels.modules import ZipformerEncoderLayer  # noqa: E402

LAYER = {
    "embed_dim": 32,
    "pos_dim": 16,
    "num_heads": 2,
    "query_head_dim": 32,
    "pos_head_dim": 4,
    "value_head_dim": 12,
    "feedforward_dim": 32,
    "cnn_module_kernel": 15,
}
FRAMES, BATCH = 4, 2
WORK = {"eval": False, "training": True}
DTYPES = {"float32": contextlib.nullcontext, "bfloat16 autocast": recording.autocast}
PEERS = ("upstream", "ours")
WARM_UP = 30

Call = Callable[[], None]


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


def layers() -> dict[str, nn.Module]:
    """Upstream's layer and ours, 10,000 steps into training, when most of what is drawn is drawn seldom."""
    torch.manual_seed(0)
    (module,) = upstream.load("zipformer")
    with upstream.activations(compiled=False):
        made = {"upstream": module.ZipformerEncoderLayer(**LAYER), "ours": ZipformerEncoderLayer(**LAYER)}
    for layer in made.values():
        for part in layer.modules():
            if hasattr(part, "batch_count"):
                part.batch_count = models.BATCH_COUNT
    return made


def call_of(layer: nn.Module, training: bool, dtype: str) -> Callable[[], Tensor]:
    """A function that runs a layer once, and its backward in training."""
    layer.train(training)
    x = torch.randn(FRAMES, BATCH, LAYER["embed_dim"], requires_grad=training)
    position = torch.randn(1, 2 * FRAMES - 1, LAYER["pos_dim"])
    padding = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [FRAMES - 1]])
    grad = torch.randn(FRAMES, BATCH, LAYER["embed_dim"])
    precision = DTYPES[dtype]

    def forward() -> Tensor:
        with precision():
            return layer(x, position, src_key_padding_mask=padding)

    def forward_and_backward() -> Tensor:
        y = forward()
        y.backward(grad)
        return y

    return forward_and_backward if training else torch.no_grad()(forward)


def seed(number: int, layer: nn.Module) -> None:
    """The same draws for each peer, and no gradients from the call before."""
    random.seed(number)
    torch.manual_seed(number)
    layer.zero_grad()


def times(layers: dict[str, nn.Module], calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Microseconds of the processor for each call of each peer, by turns; what other processes take does not count."""
    taken: dict[str, list[float]] = {peer: [] for peer in calls}
    with uncollected():
        for number in range(-WARM_UP, rounds):
            for peer, call in calls.items():
                seed(number % 1000, layers[peer])
                start = time.thread_time()
                call()
                if number >= 0:
                    taken[peer].append(1e6 * (time.thread_time() - start))
    return taken


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage is not collected within the block: it would count for whoever runs at that moment."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def counts(layer: nn.Module, call: Callable[[], Tensor], native: ModuleType | None) -> dict[str, int]:
    """What one call does. It is watched, so that this is no measurement.

    Args:
        layer: which the call runs.
        call: the function of `call_of`.
        native: the module that holds the CUDA kernels, or None for upstream's.
    """
    seed(0, layer)
    with recording.recording(native) as launches:
        call()
    kinds = Counter(launch.kind for launch in launches)
    calls: Counter[str] = Counter()
    seen = mock.patch("zipformer_kernels.core.call.count_dispatch_modes", return_value=0)
    with as_on_a_gpu(None if native is None else recording.silent(native)):
        seed(0, layer)
        sys.setprofile(lambda frame, event, argument: calls.update((event,)))
        y = call()
        sys.setprofile(None)
        seed(0, layer)
        with seen, Operations() as operations:
            call()
    return {
        "launches by PyTorch": kinds["torch"],
        "launches of kernels": kinds["triton"] + kinds["cuda"],
        "operations of PyTorch": operations.count,
        "autograd nodes": len(nodes(y)),
        "Python functions": calls["call"],
        "functions in C": calls["c_call"],
    }


def nodes(y: Tensor) -> set[Any]:
    """The nodes of autograd's graph behind a tensor."""
    found, open_ends = set(), [y.grad_fn]
    while open_ends:
        node = open_ends.pop()
        if node is not None and node not in found:
            found.add(node)
            open_ends += [following for following, _ in node.next_functions]
    return found


def measure(native: ModuleType, training: bool, dtype: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Times and counts of both peers."""
    made = layers()
    calls = {peer: call_of(layer, training, dtype) for peer, layer in made.items()}
    with as_on_a_gpu(recording.silent(native)):
        taken = times(made, calls, rounds)
    return {
        peer: {
            "median_us": round(statistics.median(us), 1),
            "least_us": round(min(us), 1),
            "quartiles_us": [round(us, 1) for us in statistics.quantiles(us, n=4)[::2]],
            **counts(made[peer], calls[peer], native if peer == "ours" else None),
        }
        for peer, us in taken.items()
    }


def profiled(native: ModuleType, peer: str, training: bool, dtype: str, rounds: int) -> pstats.Stats:
    """Where a peer's time goes, by function; profiling makes calls of functions longer than they are."""
    layer = layers()[peer]
    call, profile = call_of(layer, training, dtype), cProfile.Profile(time.thread_time)
    with as_on_a_gpu(recording.silent(native)), uncollected():
        for number in range(-WARM_UP, rounds):
            seed(number % 1000, layer)
            if number >= 0:
                profile.enable()
            call()
            profile.disable()
    return pstats.Stats(profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/host.json")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--profile", choices=PEERS, help="print where the time of a peer goes, and measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # it takes 20 us to prepare a product in bfloat16
    warnings.filterwarnings("ignore", message="CUDA is not available")
    native = recording.load_module(recording.build_module())
    results = {}
    for work, training in WORK.items():
        for dtype in DTYPES:
            if options.profile:
                print(f"{work}, {dtype}")
                stats = profiled(native, options.profile, training, dtype, options.rounds)
                stats.sort_stats("tottime").print_stats(40)
                continue
            row = results[f"{work}, {dtype}"] = measure(native, training, dtype, options.rounds)
            print(
                f"{work}, {dtype}: " + ", ".join(f"{peer} {found['median_us']:.0f} us" for peer, found in row.items())
            )
    if results:
        about = {"layer": LAYER, "frames": FRAMES, "batch": BATCH, "environment": machine.environment()}
        options.output.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
