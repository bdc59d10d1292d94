#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with an NVIDIA GPU; see --help.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: bash benchmarks/gpu_check.sh [--out FOLDER] [--wheels FOLDER] [build] [test] [sanitize] [bench]

Builds the CUDA extension in place, runs the tests on the GPU, compute-sanitizer over small shapes, and the benchmarks; all
parts by default, in this order. Needs no network: what the machine lacks of pytest, pytest-benchmark, ... comes from wheels.

  --out FOLDER     where logs and results go; by default $OUT, else gpu-check
  --wheels FOLDER  wheels to install beside the output, for this run only
  PYTHON           environment variable: the Python that has torch; python3 by default

All parts together take at most 8 minutes: the tests get 4, the sanitizer 1, the benchmarks what is left; each has a file
of its own as soon as it is done. Exits with 1 if a part failed, with 2 if the call was wrong or there is no GPU.
TEXT
}

readonly LIMIT=480 # seconds

fail() { echo "gpu_check: $*" >&2; exit 2; }

out=${OUT:-gpu-check} wheels="" parts=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --out | --wheels) [ $# -ge 2 ] || fail "$1 wants a folder"
      if [ "$1" = --out ]; then out=$2; else wheels=$2; fi
      shift ;;
    build | test | sanitize | bench) parts+=("$1") ;;
    *) fail "wanted build, test, sanitize or bench, got '$1'; see --help" ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(build test sanitize bench)
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "no folder $wheels"

python=${PYTHON:-python3}
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch; PYTHON names another"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || fail "torch sees no CUDA device"
mkdir -p "$out" || fail "cannot make $out"
out=$(cd "$out" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cd "$(dirname "$0")/.." || fail "cannot enter the checkout"

export PYTHONPATH="$out/site:$PWD:$PWD/tests" ZIPFORMER_KERNELS_BUILD=cuda PYTHONUNBUFFERED=1
unset TRITON_INTERPRET ZIPFORMER_KERNELS_BACKEND
if [ -n "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --target "$out/site" --upgrade "$wheels"/*.whl || fail "the wheels cannot be installed"
fi
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')

within() { # SECONDS COMMAND...: stops it after so long, and when all time is up
  local left=$((LIMIT - SECONDS)) most=$1
  shift
  [ $left -gt 0 ] || { echo "no time is left"; return 124; }
  timeout $((most < left ? most : left)) "$@"
}

build() {
  TORCH_CUDA_ARCH_LIST=$capability within $LIMIT "$python" setup.py build_py build_ext --inplace &&
    cp build/lib*/zipformer_kernels/_build.json zipformer_kernels/ # what an installation leaves there
}

run_tests() {
  local workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  within 240 "$python" -m pytest -q "${workers[@]}" --junit-xml="$out/tests.xml" tests
}

sanitize() {
  local tool failed=0
  command -v compute-sanitizer || { echo "compute-sanitizer is not on the PATH"; return 1; }
  for tool in memcheck racecheck synccheck initcheck; do
    within 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" benchmarks/sanitize.py >"$out/sanitize-$tool.log" 2>&1 &
  done
  for tool in memcheck racecheck synccheck initcheck; do
    wait -n || failed=1
  done
  tail -n 2 "$out"/sanitize-*.log
  return $failed
}

bench() {
  within $LIMIT "$python" -m zipformer_kernels.cli bench --output "$out/results"
}

status=0 table=""
for part in "${parts[@]}"; do
  began=$SECONDS
  case $part in
    test) run_tests ;;
    *) "$part" ;;
  esac >"$out/$part.log" 2>&1
  code=$?
  [ $code -eq 0 ] || status=1
  table+=$(printf '%-10s %-6s %5s s   %s' "$part" "$([ $code -eq 0 ] && echo ok || echo FAILED)" "$((SECONDS - began))" "$(tail -n 1 "$out/$part.log" | cut -c 1-70)")$'\n'
done
printf '%s' "$table" | tee "$out/summary.txt"
exit $status
