#!/usr/bin/env bash
# Checks and measures the kernels on a machine with an NVIDIA GPU; see --help. PYTHON names the Python that has torch.
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" "$root/benchmarks/gpu/run.py" "$@"
