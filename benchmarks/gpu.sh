#!/usr/bin/env bash
# On a CUDA machine, no network needed: build, GPU tests, sanitizer, benchmarks. Under 10 minutes; one folder of results.
#
#   benchmarks/gpu.sh [FOLDER]      default: benchmarks/results/gpu
#
# What has to be installed: torch, triton, transformers, numpy, pytest, pytest-benchmark, hypothesis (the tests that need
# hypothesis are left out where it is missing), pybind11, cmake, ninja and a C++ compiler.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results/gpu}
mkdir -p "$folder"
failed=0

# part NAME SECONDS COMMAND...: runs it, keeps its output, and goes on whatever happens.
part() {
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$folder/$name.txt" 2>&1
  local status=$?
  [ $status -eq 0 ] || failed=1
  printf '%-12s exit %-4s %4s s   %s\n' "$name" "$status" $((SECONDS - started)) "$(tail -n 1 "$folder/$name.txt")"
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python3 --version
  python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
} | tee "$folder/machine.txt"

part build 120 python3 -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
part doctor 60 python3 -m saffron.cli doctor
part tests 180 env SAFFRON_EAGER_CHECKS=1 python3 -m pytest -q -m gpu --benchmark-disable -p no:cacheprovider
sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer || true)
for tool in memcheck racecheck synccheck; do
  [ -n "$sanitizer" ] || { echo "compute-sanitizer is not installed"; break; }
  part "$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 1 python3 -m pytest -q -m gpu tests/test_triton_gpu.py -x
done
part benchmarks 200 env SAFFRON_RESULTS="$folder/results.csv" python3 -m pytest -q benchmarks

exit $failed
