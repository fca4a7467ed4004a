#!/bin/sh
# Builds codec and fork with clang, AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize:
# sanitize.sh NINJA_TARGET...  PYTHON names an interpreter that has the package's dependencies.
#
# No check of enumerations: llama.cpp's own gguf.cpp loads a type before it looks whether there is such a type.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/sanitize
mkdir -p "$build"
flags="-gline-tables-only -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=enum"
flags="$flags -fno-sanitize-recover=all"
CC=clang CXX=clang++ cmake -G Ninja -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Sanitize -DXQUANT_FUZZ=ON \
  -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" -DGGML_OPENMP=OFF -DXQUANT_CPU_VARIANTS=OFF \
  -DPython3_EXECUTABLE="$(command -v "${PYTHON:-python3}")" > "$build/log" 2>&1 || { tail -n 30 "$build/log"; exit 1; }
ninja -C "$build" "$@"
