#!/usr/bin/env bash
# On a machine with a GPU, from the root of the repository, with what prepare.sh made in target/gpu-kit: the tests and figures that
# need a card, each stage within a limit, what it says in $OUT (or ./gpu-report) as it comes. Without an argument, all stages.
#
#     scripts/gpu/first_contact.sh [tests] [golden] [figures] [jobs] [kills] [sanitizer]
set -uo pipefail
root=$PWD
out=${OUT:-$root/gpu-report}
mkdir -p "$out"
work=$(mktemp -d)
stages=${*:-tests golden figures jobs kills sanitizer}

for name in it gpu rehearsal; do
  [ -e "target/gpu-kit/$name.xz" ] || continue
  python3 -c 'import lzma,shutil,sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' \
    "target/gpu-kit/$name.xz" "$work/$name" && chmod +x "$work/$name"
done

# Where CUDA's libraries are: the toolkit, else Python's wheels.
folders="/usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib /usr/local/nvidia/lib64"
purelib=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2>/dev/null)
for folder in $folders "$purelib"/nvidia/cu13/lib "$purelib"/nvidia/*/lib; do
  [ -d "$folder" ] && LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done
export LD_LIBRARY_PATH
ldd "$work/it" | grep -E 'not found' && { echo "a CUDA library is missing"; exit 3; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

# The tests look for the program and the data where they were built.
if [ -n "${BUILT_AT:-}" ] && [ ! -e "$BUILT_AT" ]; then
  mkdir -p "$(dirname "$BUILT_AT")" && ln -s "$root" "$BUILT_AT"
fi
mkdir -p target/gpu/debug && cp "$work/rehearsal" target/gpu/debug/rehearsal
export REHEARSAL_GPU=cuda:0 RUST_BACKTRACE=0

stage() { # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  case " $stages " in *" $name "*) ;; *) return ;; esac
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "== $name: exit $?, $((SECONDS - start)) s"
  grep -E '^test result|FAILED|^failures|panicked|^(ceilings|decode|train|optimizer)|ERROR SUMMARY' "$out/$name.log" | head -80
}

stage tests 120 "$work/it" --test-threads=4 gpu::
stage golden 90 "$work/it" --test-threads=4 golden_models golden_dpo golden_ppo golden_reward
stage figures 150 "$work/gpu"
stage jobs 120 "$work/it" --test-threads=4 loops::
REHEARSAL_KILLS=${REHEARSAL_KILLS:-17} stage kills 90 "$work/it" kills::random_deaths
stage sanitizer 120 compute-sanitizer --error-exitcode 9 "$work/it" --test-threads=1 gpu::models::passes
