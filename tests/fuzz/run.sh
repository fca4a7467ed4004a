#!/bin/sh
# Fuzzes the reader of plans in GGUF files: run.sh BUILD_FOLDER [COUNT [RANDOM]]; the folder is that of a native build.
# No check of enumerations: llama.cpp's own gguf.cpp loads a type before it looks whether there is such a type.
set -e
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
build=$1
source=$build/fork/llama.cpp
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" "$here/seed.py" "$work/seed.gguf"
"${CXX:-c++}" -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize=enum \
  -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS \
  -I "$root/native/llama" -I "$root/native/include" -I "$root/native/cpu" -I "$source/include" -I "$source/ggml/include" \
  -I "$source/ggml/src" "$here/metadata.cpp" "$root/native/llama/xquant-metadata.cpp" "$root/native/cpu/plan.cpp" \
  "$source/ggml/src/gguf.cpp" -L "$build/bin" -L "$build/native" -lggml-base -lxquant \
  -Wl,-rpath,"$build/bin" -Wl,-rpath,"$build/native" -o "$work/metadata"
"$work/metadata" "$work/seed.gguf" "${2:-1000000}" "${3:-1}"
