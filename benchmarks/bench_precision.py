"""Times reduced precision and packed weights for inference on a CPU, and what they cost in accuracy.

``python benchmarks/bench_precision.py --output FILE`` runs one process for each limit on oneDNN's instruction set, for
oneDNN reads that once. Each times, in turns, upstream's encoder and ours (presets S and M, 4 x 16 s) in float32, under
bfloat16 autocast and with its `nn.Linear` layers in int8, and products at the encoders' shapes with plain and with
packed weights. A limit binds oneDNN only: MKL, FBGEMM and this package's kernels keep the processor's best.
"""

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMITS = ("DEFAULT", "AVX512_CORE_VNNI", "AVX512_CORE", "AVX2")
FRAMES, BATCH, CHANNELS = 800, 4, 192  # 16 s
ROWS = (3200, 1600, 800, 400, 200)  # of the stacks
# (in, out) in presets S and M: feed-forwards, and the projections of the queries and of the convolution module.
SHAPES = ((192, 512), (512, 192), (192, 384), (256, 768), (768, 256), (256, 272), (512, 1536), (1536, 512), (512, 1024))


def in_turns(runs, rounds):
    """Seconds of each function, called in turns after one call that does not count: {name: [seconds]}."""
    samples = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                samples[name].append(time.perf_counter() - start)
    return samples


def encoders(preset, rounds):
    """Rows for one preset: each encoder in each precision, and its error against float32 upstream."""
    import torch
    import upstream

    from zipformer_kernels import Zipformer2
    from zipformer_kernels.presets import PRESETS

    torch.manual_seed(0)
    theirs = upstream.zipformer.Zipformer(**PRESETS[preset]).eval()
    with torch.no_grad():  # fresh weights let little but the input through
        for parameter in theirs.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    ours = Zipformer2.from_preset(preset).eval()
    ours.load_state_dict(theirs.state_dict())
    x, lengths = torch.randn(FRAMES, BATCH, CHANNELS), torch.full((BATCH,), FRAMES)

    def forward(model, bfloat16=False):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return model(x, lengths)[0].float()

    runs = {}
    for name, model in (("ours", ours), ("upstream", theirs)):
        int8 = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
        runs[name, "float32"] = lambda model=model: forward(model)
        runs[name, "bfloat16"] = lambda model=model: forward(model, bfloat16=True)
        runs[name, "int8"] = lambda model=int8: forward(model)
    expected = runs["upstream", "float32"]()
    errors = {key: float((run() - expected).norm() / expected.norm()) for key, run in runs.items()}
    return [
        {"preset": preset, "model": key[0], "precision": key[1], "relative_error": errors[key], "samples_s": samples}
        for key, samples in in_turns(runs, rounds).items()
    ]


def peers(weight, bias, count):
    """Ways to compute one linear layer on `count` rows: functions without arguments."""
    import torch

    linear = torch.ops.mkldnn._linear_pointwise
    x = torch.randn(count, weight.shape[1])
    mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, count)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    x16, weight16, bias16 = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    found = {
        "float32": lambda: torch.addmm(bias, x, weight.t()),
        "float32, MKL packed": lambda: torch.ops.mkl._mkl_linear(x, mkl, weight, bias, count),
        "float32, oneDNN packed": lambda: linear(x, packed, bias, "none", [], ""),
        "bfloat16": lambda: torch.addmm(bias16, x16, weight16.t()),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # not below AVX-512
        packed16 = torch.ops.mkldnn._reorder_linear_weight(weight16)
        found["bfloat16, oneDNN packed"] = lambda: linear(x16, packed16, bias16, "none", [], "")
    return found


def products(rounds):
    """Rows for linear layers with plain weights and with weights packed by MKL and by oneDNN."""
    import torch

    rows = []
    for n_in, n_out in SHAPES:
        for count in ROWS:
            with torch.inference_mode():
                samples = in_turns(peers(torch.randn(n_out, n_in), torch.randn(n_out), count), rounds)
            shape = {"rows": count, "in": n_in, "out": n_out}
            rows += [{**shape, "peer": peer, "samples_s": samples[peer]} for peer in samples]
    return rows


def measure(rounds):
    """One process's rows."""
    import torch

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.ao")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantiz.*")
        models = [row for preset in ("S", "M") for row in encoders(preset, rounds)]
    return {"encoders": models, "products": products(8 * rounds), "torch": torch.__version__}


def environment():
    """The machine, and how busy it was at first."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    info = {key.strip(): value.strip() for key, _, value in lines}
    flags = info["flags"].split()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {
        "device": info["model name"],
        "matrix_flags": [flag for flag in flags if flag.startswith(("amx", "avx512_vnni", "avx512_bf16"))],
        "threads": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
    }


def main():
    """Runs every limit and writes the results; or, asked by itself, measures under one limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.rounds)))
        return
    results = {"environment": environment(), "limits": {}}
    for limit in LIMITS:
        command = [sys.executable, __file__, "--measure", "--rounds", str(args.rounds)]
        child = subprocess.run(
            command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": limit}, stdout=subprocess.PIPE, text=True, check=True
        )
        results["limits"][limit] = json.loads(child.stdout)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
