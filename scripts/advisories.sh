#!/usr/bin/env bash
# Compares Cargo.lock with the RustSec advisory database, a copy of which must be on this machine:
#
#   scripts/advisories.sh DATABASE     a clone of the Git repository rustsec/advisory-db, bare or not
#
# Prints the date of the database's newest advisory, which deny.toml records; an old copy misses what came after it. Needs
# git and cargo-deny, which `.ci/run tools` installs. It is no step of .ci/run, because its result changes with the
# database and not with the code.
set -euo pipefail
database=$(realpath "${1:?usage: scripts/advisories.sh DATABASE}")
cd "$(dirname "$0")/.."

# The name that cargo-deny 0.20 gives to its copy of the database.
copy=target/advisory-dbs/advisory-db-3157b0e258782691
rm -rf "$copy"
mkdir -p "$(dirname "$copy")"
git clone -q --depth 1 "file://$database" "$copy"
echo "database of $(git -C "$copy" log -1 --format=%cs)"
PATH=$PWD/target/cargo-deny:$PATH cargo deny --offline --all-features check advisories
