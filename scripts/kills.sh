#!/usr/bin/env bash
# Random deaths of the program over every kind of job, and power cuts: the table of docs/reliability.md. Needs strace, and root for
# the power cuts.
#
#   scripts/kills.sh [DEATHS [CUTS [SEED]]]
set -euo pipefail
cd "$(dirname "$0")/.."
export REHEARSAL_KILLS=${1:-1000} REHEARSAL_CUTS=${2:-100} REHEARSAL_SEED=${3:-1} REHEARSAL_REQUIRE=strace,fuse
cargo test --features full --test it kills:: -- --nocapture --test-threads 1
