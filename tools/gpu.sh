#!/usr/bin/env bash
# Builds the fork with CUDA for the GPU at hand, runs the tests marked cuda, prints the benchmarks and, last, a table of
# what passed and how long it took: under ten minutes with 16 cores and an H100.  A step that fails does not stop the
# others; without a library that loads there are none.
# usage: tools/gpu.sh BUILD_FOLDER [CMAKE_ARGUMENTS]
#        (in a Python environment with the test requirements; needs nvcc, cmake, ninja)
set -uo pipefail
cd "$(dirname "$0")/.."
build=$1
shift
arguments=("$@")
mkdir -p "$build" xquant_gguf/lib
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_WAIT_POLICY=passive
summary=() failed=0

# step NAME COMMAND...: runs it, its output on the screen and in BUILD_FOLDER/NAME.log
step() {
  local name=$1 start=$SECONDS said=ok
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$build/$name.log" || { said=FAILED; failed=1; }
  summary+=("$(printf '%-12s %-7s %4d s   %s' "$name" "$said" $((SECONDS - start)) "$(grep -E 'passed|copies at' "$build/$name.log" | tail -n 1)")")
  [ $said = ok ]
}
finish() {
  echo "== summary"
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1
  printf '%s\n' "${summary[@]}"
  exit $failed
}

configure() {
  cmake -G Ninja -S . -B "$build" -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native -DXQUANT_CUDA_ARCHITECTURES=native \
    "${arguments[@]}" > "$build/cmake.log" 2>&1 || { tail -n 40 "$build/cmake.log"; return 1; }
}
compile() {
  ninja -C "$build" fork > "$build/ninja.log" 2>&1 || { tail -n 40 "$build/ninja.log"; return 1; }
  cmake --install "$build" --prefix . --component xquant > /dev/null
}

step configure configure && step build compile && step load python3 -c 'from xquant_gguf import Llama' || finish
step kernels python3 -m pytest -q -m cuda tests/kernels
step fork python3 -m pytest -q -m cuda tests/fork/test_cuda.py
step attention python3 benchmarks/attention_cuda.py
step unpack python3 benchmarks/unpack_cuda.py
step update python3 benchmarks/update_cuda.py
step memory python3 benchmarks/gpu_memory.py
step bench python3 -m xquant_gguf bench --shape llama-8b --layers 8 --depths 0,32768,131072 \
  --kv-types f16,q4_0,xquant,xquant-tiny --n-prompt 512 --n-decode 64 --n-gpu-layers -1
step parallel python3 -m xquant_gguf bench --shape llama-8b --layers 8 --depths 16384 --parallel 8 \
  --kv-types f16,q4_0,xquant,xquant-tiny --n-prompt 512 --n-decode 32 --n-gpu-layers -1
finish
