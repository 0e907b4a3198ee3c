#!/usr/bin/env bash
# On a CUDA machine, no network needed: build, tests, sanitizer, benchmarks, profile. Ends within SAFFRON_GPU_SECONDS
# (default 580); everything it writes is in one folder: summary.txt, log.txt, results.csv, left-out.txt, table.md,
# decisions.md, ncu.csv. What is measured says by itself on which GPU, with which versions and which commit (where the
# checkout came without its .git, SAFFRON_COMMIT names it).
#
#   benchmarks/gpu.sh [FOLDER [STAGE...]]      default: benchmarks/results/gpu, all stages
#
# Stages, and the seconds that each may take at most:
#   build       300  both native modules, for this GPU (SAFFRON_CUDA_ARCHS: another one), where they are imported
#   doctor       40  which backend serves which op
#   tests       300  what is marked gpu
#   memcheck racecheck synccheck   180 each: compute-sanitizer over tests/support/every_op.py
#   ops         150  benchmarks of everything but attention
#   attention   400  benchmarks of tree_attention on all workloads
#   step        300  a decode step of 8B + 1B parameters, captured and not; whole searches
#   profile     120  ncu over benchmarks/flagship.py
# All of them do not fit into ten minutes. Where a machine is held for so long at a time, three calls:
#   gpu.sh A build doctor tests memcheck racecheck synccheck
#   gpu.sh B build ops attention
#   gpu.sh C build step profile
# A stage that fails or runs out of its time does not stop the others; what was measured until then is in results.csv.
# FlashInfer, where it is installed, compiles its kernels at the first call: `competitors` (550 s), asked for by name,
# does that before anything is timed.
#
# What has to be installed: torch, triton, transformers, numpy, rich, jinja2, pytest, pytest-benchmark, hypothesis,
# pybind11, cmake, ninja, a C++ compiler and nvcc; peft for tests of adapters, pytest-xdist is used where it is there.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(mkdir -p "${1:-benchmarks/results/gpu}" && cd "${1:-benchmarks/results/gpu}" && pwd) || exit 2
[ $# -eq 0 ] || shift
known="build doctor tests memcheck racecheck synccheck ops attention step profile"
for stage in "$@"; do
  [[ " $known competitors " == *" $stage "* ]] || { echo "no stage $stage; there are: $known competitors" >&2; exit 2; }
done
stages=" ${*:-$known} "
deadline=$((SECONDS + ${SAFFRON_GPU_SECONDS:-580}))
summary=$folder/summary.txt
log=$folder/log.txt
failed=0
: >"$summary"
: >"$log"
# The packages of this checkout, also where another copy is installed.
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 SAFFRON_RESULTS="$folder/results.csv"

say() { printf '%s\n' "$*" | tee -a "$summary"; }

wanted() { [[ $stages == *" $1 "* ]]; }

# part NAME SECONDS COMMAND...: runs it within the seconds it has, logs what it says, and goes on whatever happens.
part() {
  local name=$1 limit=$2 started=$SECONDS output=$folder/.output status last
  shift 2
  wanted "$name" || return 0
  [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
  if [ "$limit" -lt 5 ]; then
    failed=1
    say "$(printf '%-11s not run: no time left' "$name")"
    return 0
  fi
  printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$output" 2>&1
  status=$?
  cat "$output" >>"$log"
  last=$(grep -v '^[[:space:]]*$' "$output" | tail -n 1 | cut -c 1-100)
  rm -f "$output"
  [ $status -eq 0 ] || failed=1
  case $status in 0) status=ok ;; 124 | 130 | 137) status="out of time" ;; *) status="exit $status" ;; esac
  say "$(printf '%-11s %-12s %4s s   %s' "$name" "$status" $((SECONDS - started)) "$last")"
}

skip() {
  for name in "${@:2}"; do
    if wanted "$name"; then say "$(printf '%-11s not run: %s' "$name" "$1")"; fi
  done
}

# By CMake alone: an installation by pip asks for a recent setuptools and an environment that can be written to.
build() {
  local cmake nvcc
  cmake=$(command -v cmake || python3 -c 'import cmake; print(cmake.CMAKE_BIN_DIR + "/cmake")') || return
  nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc) || { echo "nvcc was not found"; return 1; }
  "$cmake" -G Ninja -S . -B build/gpu -DPython_EXECUTABLE="$(command -v python3)" \
    -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/saffron_kernels" \
    -DSAFFRON_CUDA=on -DSAFFRON_CUDA_ARCHS="${SAFFRON_CUDA_ARCHS:-}" -DCMAKE_CUDA_COMPILER="$nvcc" &&
    "$cmake" --build build/gpu && python3 -c 'import saffron_kernels._native, saffron_kernels._cuda; print("built")'
}
export -f build

# measure STAGE SECONDS FILE...: runs those benchmarks.
measure() {
  part "$1" "$2" python3 -m pytest -q -p no:cacheprovider "${@:3}"
}

say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no GPU')"
say "$(python3 -c '
import importlib.util, platform, torch
versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
if importlib.util.find_spec("triton"):
    import triton
    versions.append(f"triton {triton.__version__}")
print(", ".join(versions))' 2>&1 | tail -n 1), commit $(git rev-parse --short HEAD 2>/dev/null || echo "${SAFFRON_COMMIT:-unknown}")"
say "$( (nvcc --version || /usr/local/cuda/bin/nvcc --version) 2>/dev/null | grep release || echo 'no nvcc')"
gpu=$(python3 -c 'import torch; print(int(torch.cuda.is_available()))' 2>/dev/null || echo 0)
sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer || true)
ncu=$(command -v ncu || command -v /usr/local/cuda/bin/ncu || true)

part build 300 bash -c build
part doctor 40 python3 -m saffron.cli doctor
if [ "$gpu" = 1 ]; then
  workers=()
  python3 -c 'import xdist' 2>/dev/null && workers=(-n 8)
  part tests 300 python3 -m pytest -q tests -m gpu "${workers[@]}" --benchmark-disable \
    -p no:cacheprovider --continue-on-collection-errors -k "not test_sanitizer" --maxfail 50
  if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck synccheck; do
      # An allocation a tensor, so that a step outside is seen; calls that PyTorch makes in vain are not ours.
      part $tool 180 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --report-api-errors no \
        --error-exitcode 9 python3 tests/support/every_op.py
    done
  else
    skip "compute-sanitizer is not installed" memcheck racecheck synccheck
  fi
  part competitors 550 python3 benchmarks/competitors.py
else
  skip "no GPU" tests memcheck racecheck synccheck competitors
fi
measure ops 150 benchmarks/bench_{small_ops,nucleus,multifurcate}.py
measure attention 400 benchmarks/bench_tree_attention.py
measure step 300 benchmarks/bench_{step,search}.py
if [ "$gpu" = 1 ] && [ -n "$ncu" ]; then
  # Sections rather than metrics, whose names differ between chips; the clocks stay as they are.
  part profile 120 "$ncu" --profile-from-start off --nvtx --clock-control none --csv --log-file "$folder/ncu.csv" \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section LaunchStats --section Occupancy \
    --section WarpStateStats python3 benchmarks/flagship.py
else
  skip "no GPU, or ncu is not installed" profile
fi
if [ -f "$folder/results.csv" ]; then
  stages="$stages table decide "
  deadline=$((deadline + 15))
  part table 15 python3 benchmarks/report.py --results "$folder/results.csv" --no-curves
  part decide 15 python3 benchmarks/decide.py --results "$folder/results.csv"
fi

printf '\n'
[ -f "$folder/results.csv" ] && python3 benchmarks/report.py --results "$folder/results.csv" --brief | tail -n 60
[ -f "$folder/decisions.md" ] && cat "$folder/decisions.md"
cat "$summary"
exit $failed
