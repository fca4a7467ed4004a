#!/usr/bin/env bash
# Runs compute-sanitizer over the kernel tests: memcheck over all of them, racecheck over those without attention on the
# tensor cores.  There teams of warps meet at barriers of their own, whose numbers are in registers: racecheck then loses count of the
# block's barriers too, and reports what __syncthreads() keeps apart: see tools/break_barriers.py.
# usage: tools/sanitize_cuda.sh [PYTEST_OPTIONS]    (a build with CUDA in xquant_gguf/lib)
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
general="(means or mapped) and double_precision" # attention that takes the general kernel
declare -A tests=([memcheck]="" [racecheck]="not each_verb and (test_update or test_unpack or ($general))")
for tool in memcheck racecheck; do
  log=$(mktemp)
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 7 --kernel-regex kns=xq --log-file "$log" \
    python3 -m pytest -q -m cuda tests/kernels -k "${tests[$tool]}" "$@" || { cat "$log"; exit 1; }
  tail -n 1 "$log"
done
