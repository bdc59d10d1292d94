#!/usr/bin/env bash
# Checks and measures the kernels on a machine with an NVIDIA GPU; see --help. PYTHON names the Python that has torch.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu/run.py" "$@"
