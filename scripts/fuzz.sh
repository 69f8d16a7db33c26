#!/usr/bin/env bash
# Fuzzes every target, or those named, for some seconds each. Needs a nightly toolchain and `cargo install cargo-fuzz`.
#
#   scripts/fuzz.sh SECONDS [TARGET...]
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
seconds=$1
shift
targets=("$@")
if [ ${#targets[@]} = 0 ]; then mapfile -t targets < <(cargo +nightly fuzz list); fi
for target in "${targets[@]}"; do
  # What is found goes to a folder of its own: the committed corpus stays small.
  mkdir -p "target/found/$target"
  cargo +nightly fuzz run "$target" "target/found/$target" "corpus/$target" -- \
    -max_total_time="$seconds" -timeout=20 -rss_limit_mb=3000 -max_len=65536 -print_final_stats=1
done
