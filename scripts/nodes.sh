#!/usr/bin/env bash
# Kills nodes and coordinators at random instants (SIGKILL) until N have died; every job must end as one process without a death.
#
#     scripts/nodes.sh [N] [SEED]           500 by default; about a quarter of a second each
set -euo pipefail
cd "$(dirname "$0")/.."
REHEARSAL_NODE_KILLS=${1:-500} REHEARSAL_SEED=${2:-1} \
  cargo test --features full --test it distributed::nodes::nodes_and -- --nocapture
