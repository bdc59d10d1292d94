"""Encodes the recordings beside this file with a small Zipformer, on plain PyTorch and on the best backend.

Prints what each recording gave, the largest difference between the two, and both times. Weights are random:
speed and agreement do not depend on them.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zipformer_kernels
from zipformer_kernels.commands.audio import FRAMES_PER_SECOND, features_of
from zipformer_kernels.commands.batching import encode
from zipformer_kernels.commands.encode import make_model
from zipformer_kernels.commands.info import ops_table

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.wav"))
RUNS = 3
# Of the embeddings' root mean square: float32 sums in another order, through a dozen layers.
TOLERANCE = 1e-4


def main() -> None:
    """Runs the demonstration. Exits with an error if the backends disagree."""
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embed, encoder = (model.to(device) for model in make_model("S", None, causal=False, how={}))
    features = [features_of(path) for path in RECORDINGS]

    @torch.inference_mode()
    def run(backend: str) -> tuple[list[Tensor], float]:
        start = time.perf_counter()
        with zipformer_kernels.use_backend(backend):
            embeddings = [e.cpu() for e in encode(embed, encoder, features)]
        return embeddings, time.perf_counter() - start

    run("eager"), run("auto")  # warm up: compilation, caches, memory
    times: dict[str, list[float]] = {"eager": [], "auto": []}
    results = {}
    for _ in range(RUNS):
        for backend, seconds in times.items():  # turn by turn, so that a busy machine slows both
            results[backend], elapsed = run(backend)
            seconds.append(elapsed)

    table = Table("recording", "seconds", "frames", "channels", "largest difference")
    for column in table.columns[1:]:
        column.justify = "right"
    worst = 0.0
    for path, x, expected, actual in zip(RECORDINGS, features, results["eager"], results["auto"], strict=True):
        difference = (actual - expected).abs().max().item()
        worst = max(worst, difference / expected.square().mean().sqrt().item())
        shape = map(str, expected.shape)
        table.add_row(path.stem, f"{len(x) / FRAMES_PER_SECOND:.2f}", *shape, f"{difference:.1e}")
    console.print("Zipformer S, random weights, one batch of recorded speech (see recordings/ATTRIBUTION.md)")
    console.print(table)

    eager, best = (statistics.median(times[backend]) for backend in ("eager", "auto"))
    console.print(ops_table())
    console.print(f"largest difference   {worst:.1e} of the embeddings' root mean square")
    console.print(f"plain PyTorch        {1000 * eager:.0f} ms, median of {RUNS} on {device}")
    console.print(f"best backend         {1000 * best:.0f} ms")
    console.print(f"speed-up             {eager / best:.2f}x")
    if not worst <= TOLERANCE:
        raise SystemExit(f"the backends disagree: {worst:.1e} is more than {TOLERANCE}")


if __name__ == "__main__":
    main()
