#!/usr/bin/env bash
# Compares PyTorch and Rehearsal in turn: generation at batch 16, decoding only, and a forward and backward pass over 8 x 128
# tokens.
#
#   scripts/compare_torch.sh PYTHON PROBE HF_DIR [ROUNDS]
#
# PYTHON has torch 2.15 and transformers 5.23. `PROBE f32|bf16 HF_DIR` prints `... gen bs 16 N tok/s ...` for 48 new tokens after
# prompts of 40, and `fwd+bwd SECONDS` for each of some passes over 8 sequences of 128 tokens, on two threads.
# Rehearsal runs the same shapes of the same architecture (SmolLM2-135M) with random weights: `cargo bench --bench whole`.
set -euo pipefail
python=$1 probe=$2 hf=$3 rounds=${4:-2}
here=$(cd "$(dirname "$0")/.." && pwd)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$here/target}
criterion=$CARGO_TARGET_DIR/criterion
ours() { # WHOLE names the benchmark's program if it is already built
  if [ -n "${WHOLE:-}" ]; then "$WHOLE" --bench "$@"; else (cd "$here" && cargo bench --bench whole -- "$@"); fi
}
for round in $(seq "$rounds"); do
  for dtype in f32 bf16; do
    theirs=$("$python" "$probe" "$dtype" "$hf" 2>/dev/null)
    decode=$("$python" "$here/scripts/torch_decode.py" "$dtype" "$hf" 2>/dev/null)
    rm -rf "$criterion/decode a token/$dtype" "$criterion/generate 48 tokens" "$criterion/8 x 128 tokens $dtype"
    ours "generate 48 tokens/$dtype/16" >/dev/null 2>&1
    ours "decode a token/$dtype" >/dev/null 2>&1
    ours "8 x 128 tokens $dtype" >/dev/null 2>&1
    "$python" - "$round" "$dtype" "$criterion" "$theirs" "$decode" <<'P'
import json, re, sys
round_, dtype, criterion, theirs, decode = sys.argv[1:]
median = lambda path: json.load(open(f"{criterion}/{path}/new/estimates.json"))["median"]["point_estimate"] / 1e9
rate = float(re.search(r"gen bs 16 ([\d.]+) tok/s", theirs).group(1))
passes = sorted(float(x) for x in re.findall(r"fwd\+bwd ([\d.]+)", theirs))
ours, step = 16 * 48 / median(f"generate 48 tokens/{dtype}/16"), median(f"8 x 128 tokens {dtype}/8")
token = 16 / median(f"decode a token/{dtype}/16")
print(f"round {round_} {dtype}: decode {token:.0f} against {float(decode):.0f} tokens/s = {token / float(decode):.2f}; generate {ours:.0f} against {rate:.0f} tokens/s = {ours / rate:.2f}; "
      f"forward + backward {step:.2f} against {passes[0]:.2f} s (its best of {len(passes)}) = {step / passes[0]:.2f}")
P
  done
done
