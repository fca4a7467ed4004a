#!/bin/sh
# Fuzzes what takes input from outside: run.sh TARGET SECONDS [options of libFuzzer].  TARGET: metadata, state,
# codec, verbs or nodes.
#
# PYTHON names an interpreter that has the package.  The corpus is kept in build/sanitize/corpus/TARGET; an input that
# ends the target is written to build/sanitize/found/TARGET.
set -e
root=$(cd "$(dirname "$0")/../.." && pwd)
target=$1
seconds=$2
shift 2
"$root/tools/sanitize.sh" "fuzz-$target"

build=$root/build/sanitize
corpus=$build/corpus/$target
mkdir -p "$corpus" "$build/found/$target"
(cd "$build" && "${PYTHON:-python3}" "$root/tests/fuzz/seed.py" "$build")
export XQUANT_FUZZ_MODELS="$build/models" UBSAN_OPTIONS=print_stacktrace=1
[ "$target" != state ] || XQUANT_FUZZ_SEEDS="$corpus" "$build/tests/fuzz/fuzz-state"
exec "$build/tests/fuzz/fuzz-$target" -max_total_time="$seconds" -max_len=40000 -timeout=30 -rss_limit_mb=3000 \
  -print_final_stats=1 -artifact_prefix="$build/found/$target/" "$@" "$corpus"
