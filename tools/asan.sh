#!/bin/sh
# Builds codec and fork with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of what takes input from
# outside: asan.sh [pytest arguments].  PYTHON names an interpreter that has the package's dependencies and pytest.
#
# No check of enumerations: llama.cpp's own gguf.cpp loads a type before it looks whether there is such a type.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/asan
python=${PYTHON:-python3}
flags="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=enum -fno-sanitize-recover=all"
flags="$flags -D_GLIBCXX_ASSERTIONS"
cmake -G Ninja -S "$root" -B "$build/native" -DCMAKE_BUILD_TYPE=Sanitize -DCMAKE_C_FLAGS="$flags" \
  -DCMAKE_CXX_FLAGS="$flags" -DPython3_EXECUTABLE="$(command -v "$python")"
ninja -C "$build/native" fork

# the package as it would be installed, with these libraries
mkdir -p "$build/site/xquant_gguf/lib"
tar -C "$root" --exclude=xquant_gguf/lib --exclude=__pycache__ -c xquant_gguf | tar -C "$build/site" -x
cp "$build"/native/bin/lib*.so "$build/native/native/libxquant.so" "$root/native/include/xquant.h" \
  "$root/native/llama/xquant_llama.h" "$build/site/xquant_gguf/lib"

cd "$root"
[ $# -gt 0 ] || set -- tests/test_attention.py tests/test_cache.py tests/test_codec.py tests/test_kernels.py \
  tests/test_metadata.py tests/test_operations.py tests/test_robust.py tests/test_scenarios.py
# Python itself leaks what it keeps until it ends
PYTHONPATH=$build/site ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$("${CXX:-c++}" -print-file-name=libasan.so) $("${CXX:-c++}" -print-file-name=libstdc++.so)" \
  "$python" -m pytest -p no:cacheprovider "$@"
