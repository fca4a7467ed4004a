#!/usr/bin/env bash
# Runs compute-sanitizer over the kernel tests: memcheck over all of them, racecheck over those that share memory.
# usage: tools/sanitize_cuda.sh [PYTEST_OPTIONS]    (a build with CUDA in xquant_gguf/lib)
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
for tool in memcheck racecheck; do
  log=$(mktemp)
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 7 --kernel-regex kns=xq --log-file "$log" \
    python3 -m pytest -q -m cuda tests/test_cuda_kernels.py "$@" || { cat "$log"; exit 1; }
  tail -n 1 "$log"
done
