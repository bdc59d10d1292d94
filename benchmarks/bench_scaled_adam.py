"""ScaledAdam's step over all parameters of a preset, beside upstream's and torch's fused AdamW.

``pytest benchmarks/bench_scaled_adam.py --benchmark-enable`` times each optimizer by itself. ``python
benchmarks/bench_scaled_adam.py [--preset S] [--rounds 30] [--output FILE]`` lets them take turns, step by step, so that
whatever else the machine does falls on all alike; prints a table, and writes every sample to FILE as JSON.
"""

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import upstream  # noqa: E402

from zipformer_kernels import use_backend  # noqa: E402
from zipformer_kernels.encoder import Zipformer  # noqa: E402
from zipformer_kernels.modules.subsampling import Conv2dSubsampling  # noqa: E402
from zipformer_kernels.ops import example, scaled_adam  # noqa: E402
from zipformer_kernels.optim import ScaledAdam  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BYTES_PER_PARAMETER = 36  # p and g read; p, g, v, m read and p, v, m written


def parameters(preset, device=DEVICE):
    """New parameters of a preset's conv embed and encoder, with gradients."""
    torch.manual_seed(0)
    modules = Conv2dSubsampling.from_preset(preset), Zipformer.from_preset(preset)
    params = [torch.nn.Parameter(p.detach().to(device)) for module in modules for p in module.parameters()]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-2
    return params


def contestants(preset, device=DEVICE):
    """For each optimizer a function that takes one step, with the recipes' options."""
    options = {"lr": 0.045, "clipping_scale": 2.0}

    def ours(backend):
        optimizer = ScaledAdam(parameters(preset, device), **options)

        def step():
            with use_backend(backend):
                optimizer.step()

        return step

    available = [
        name
        for name in scaled_adam._op.backends
        if scaled_adam._op.unsupported(name, *example("scaled_adam", device=device)) is None
    ]
    theirs = upstream.optim.ScaledAdam(parameters(preset, device), **options)
    theirs.show_dominant_parameters = False  # only logs
    return {
        "upstream": theirs.step,
        **{name: ours(name) for name in available},
        "AdamW(fused=True)": torch.optim.AdamW(parameters(preset, device), fused=True).step,
    }


def finish():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def take_turns(steps, rounds, warmup=5):
    """Seconds of each step of each contestant, who take turns."""
    samples = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, step in steps.items():
            finish()
            start = time.perf_counter()
            step()
            finish()
            if i >= warmup:
                samples[name].append(time.perf_counter() - start)
    return samples


def device_name():
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    models = [line.split(":", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{models[0].strip()}, {torch.get_num_threads()} threads"


def report(preset, samples):
    """What is written to disk: every sample, and what it was measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "csrc/scaled_adam", "zipformer_kernels/optim", "zipformer_kernels/ops"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "what": f"one optimizer step over all parameters of Zipformer {preset} and its conv embed, in turns",
        "preset": preset,
        "parameters": sum(p.numel() for p in parameters(preset, "meta")),
        "tensors": len(parameters(preset, "meta")),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_at_the_end": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() + ("" if not changed.stdout.strip() else " and changes"),
        "median_seconds": medians,
        "fastest_seconds": {name: min(values) for name, values in samples.items()},
        "times_as_fast_as_upstream": {name: medians["upstream"] / median for name, median in medians.items()},
        "times_as_long_as_fused_adamw": {
            name: median / medians["AdamW(fused=True)"] for name, median in medians.items()
        },
        "samples_seconds": samples,
    }


@pytest.mark.parametrize("name", ["upstream", *scaled_adam._op.backends, "AdamW(fused=True)"])
def test_step(benchmark, name):
    steps = contestants("S")
    if name not in steps:
        pytest.skip(f"{name} does not run here")
    step = steps[name]
    benchmark.pedantic(lambda: (step(), finish()), rounds=20, warmup_rounds=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="S", choices=["S", "M", "L"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    found = report(arguments.preset, take_turns(contestants(arguments.preset), arguments.rounds))
    print(f"{found['parameters'] / 1e6:.1f}M parameters in {found['tensors']} tensors, {found['device']}")
    for name, median in found["median_seconds"].items():
        rate = found["parameters"] * BYTES_PER_PARAMETER / median / 1e9
        print(
            f"{name:18} {median * 1e3:8.2f} ms  {found['times_as_fast_as_upstream'][name]:6.2f} x upstream  "
            f"{found['times_as_long_as_fused_adamw'][name]:6.2f} x AdamW's time  {rate:6.1f} GB/s"
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
