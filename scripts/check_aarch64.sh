#!/usr/bin/env bash
# Runs the unit tests of models and kernels on AArch64 under emulation: NEON and portable kernels give the same bits, and so do
# whole passes and generation.
#
#   [RUSTC=...] scripts/check_aarch64.sh [TEST_FILTER]
#
# Needs Rust's standard library for aarch64-unknown-linux-gnu (`rustup target add aarch64-unknown-linux-gnu`, or RUSTC naming
# a compiler that has it), aarch64-linux-gnu-gcc and -g++, and qemu-aarch64. The first build takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
cargo test -p rehearsal-kernels -p rehearsal-lm -p rehearsal-learn --lib --target "$target" -- "$@"
