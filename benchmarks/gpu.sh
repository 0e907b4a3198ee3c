#!/usr/bin/env bash
# On a CUDA machine, no network needed: gpu.sh FOLDER first, then gpu.sh FOLDER second. See gpu.py.
cd "$(dirname "$0")/.." && exec python3 benchmarks/gpu.py "$@"
