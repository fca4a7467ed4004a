#!/usr/bin/env bash
# Builds the fork with CUDA for the GPU at hand, runs the tests marked cuda and prints the benchmarks.
# usage: tools/gpu.sh BUILD_FOLDER    (in a Python environment with the test requirements; needs nvcc, cmake, ninja)
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_WAIT_POLICY=passive
cmake -G Ninja -S . -B "$build" -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native -DXQUANT_CUDA_ARCHITECTURES=native \
  > "$build.log"
ninja -C "$build" fork >> "$build.log" || { tail -n 40 "$build.log"; exit 1; }
mkdir -p xquant_gguf/lib
cp "$build"/bin/*.so "$build"/native/*.so native/include/xquant.h native/llama/xquant_llama.h xquant_gguf/lib/
python3 -m pytest -q -m cuda tests/test_cuda.py tests/test_cuda_kernels.py
python3 benchmarks/attention_cuda.py
python3 -m xquant_gguf bench --shape llama-8b --layers 8 --depths 0,32768,131072 --kv-types f16,q4_0,xquant,xquant-tiny \
  --n-prompt 512 --n-decode 32 --n-gpu-layers -1
