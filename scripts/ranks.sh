#!/usr/bin/env bash
# Random deaths of MPI ranks: the figures of docs/machines.md. Needs `mpirun`, an MPI with its headers, and libclang.
#
#   scripts/ranks.sh [DEATHS [SEED]]
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --features full,mpi --bin rehearsal --example query_ledger
install -D target/debug/rehearsal target/mpi/rehearsal
export REHEARSAL_MPI=$PWD/target/mpi/rehearsal REHEARSAL_RANK_KILLS=${1:-500} REHEARSAL_SEED=${2:-1} REHEARSAL_REQUIRE=mpi
cargo test --workspace --features full --test it distributed::ranks::a_killed_rank -- --nocapture
