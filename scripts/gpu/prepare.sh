#!/usr/bin/env bash
# Builds what first_contact.sh runs on a machine with a GPU, which needs no compiler then: tests, benchmark and program with the
# feature `cuda`, stripped and packed into target/gpu-kit (some 30 MB). Needs the CUDA toolkit (nvcc), and no GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
kit=target/gpu-kit
mkdir -p "$kit"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
cargo test --target-dir target/gpu --features full,cuda --no-run --test it --bench gpu 2>&1 | tee "$log"
it=$(sed -n 's/.*Executable tests\/it\/main.rs (\(.*\))/\1/p' "$log")
bench=$(sed -n 's/.*Executable benches\/gpu.rs (\(.*\))/\1/p' "$log")
for pair in "$it:it" "$bench:gpu" target/gpu/debug/rehearsal:rehearsal; do
  from=${pair%%:*} to=$kit/${pair##*:}
  strip -o "$to" "$from"
  xz -T0 -6 -f "$to"
done
ls -l "$kit"
