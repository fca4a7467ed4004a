#!/bin/sh
# Runs the tests of what takes input from outside with AddressSanitizer and UndefinedBehaviorSanitizer in codec and fork:
# asan.sh [pytest arguments].  PYTHON names an interpreter that has the package's dependencies and pytest.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/sanitize
python=${PYTHON:-python3}
"$root/tools/sanitize.sh" fork

# the package as it would be installed, with these libraries
cmake --install "$build" --prefix "$build/site" --component xquant > /dev/null
tar -C "$root" --exclude=xquant_gguf/lib --exclude=__pycache__ -c xquant_gguf xquant_gguf_hook | tar -C "$build/site" -x

cd "$root"
# two tests limit the address space, of which ASan takes all, and ask for an address that ASan has
[ $# -gt 0 ] || set -- -m "not arm" tests/unit/test_plan.py tests/kernels/test_attend.py tests/kernels/test_codec.py \
  tests/kernels/test_kernels.py tests/kernels/test_refused.py tests/kernels/test_unpack.py \
  tests/kernels/test_update.py tests/fork/test_cache.py tests/fork/test_images.py tests/fork/test_metadata.py \
  tests/fork/test_operations.py tests/fork/test_robust.py tests/fork/test_scenarios.py tests/fork/test_states.py \
  tests/fork/test_threads.py \
  --deselect tests/fork/test_robust.py::test_memory_that_cannot_be_had_is_an_error \
  --deselect tests/kernels/test_refused.py::test_kernels_that_cannot_run_are_an_error_of_every_verb
# Python itself leaks what it keeps until it ends; the sources beside us, which have no libraries, are not to be found
PYTHONPATH=$build/site ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$(clang -print-file-name=libclang_rt.asan-x86_64.so) $(clang -print-file-name=libstdc++.so)" \
  "$python" -c 'import sys; sys.path.remove(""); import pytest; sys.exit(pytest.main())' -p no:cacheprovider "$@"
