#!/usr/bin/env bash
# Compares TRL and Rehearsal on the same online-DPO work, in turn, and prints the ratios of step time and peak memory.
# REHEARSAL names a program that is already built.
#
#   [DTYPE=f32|bf16] [PROMPT_CHARS=120] scripts/compare_trl.sh PYTHON TRL_SCRIPT MODEL.gguf HF_DIR PROMPTS.jsonl [ROUNDS] [STEPS]
#
# With bf16 TRL keeps weights, gradients and moments in bf16; Rehearsal keeps weights and gradients in f32, computes
# in bf16 and keeps the moments in bf16.
# PYTHON has trl 1.16, transformers 5.23 and torch 2.15. TRL_SCRIPT runs TRL's OnlineDPOTrainer on STEPS steps of
# 8 prompts x 2 completions x 48 new tokens and prints one JSON line with step_s_median and peak_rss_gb.
# HF_DIR is the same model as a Hugging Face directory (`rehearsal export`, or a converter).
set -euo pipefail
python=$1 trl=$2 gguf=$3 hf=$4 prompts=$5 rounds=${6:-2} steps=${7:-5}
dtype=${DTYPE:-f32} chars=${PROMPT_CHARS:-120}
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
[ -n "${REHEARSAL:-}" ] || cargo build --release --manifest-path "$here/Cargo.toml" >&2

# The same prompts for both: the first distinct ones of at most PROMPT_CHARS characters.
"$python" - "$prompts" "$work/prompts.jsonl" "$steps" "$chars" <<'P'
import json, sys
rows = dict.fromkeys(p for p in (json.loads(l)["prompt"] for l in open(sys.argv[1])) if isinstance(p, str))
rows = [r for r in rows if len(r) <= int(sys.argv[4])][: 8 * (int(sys.argv[3]) + 1)]
open(sys.argv[2], "w").writelines(json.dumps({"prompt": r}) + "\n" for r in rows)
P
ours() {
  rm -rf "$work/job"
  cat > "$work/job.toml" <<T
[job]
directory = "job"
steps = $steps
[model]
policy = "$gguf"
dtype = "$dtype"
[prompts]
train = "prompts.jsonl"
[rollout]
prompts_per_step = 8
completions_per_prompt = 2
max_new_tokens = 48
min_new_tokens = 48
temperature = 0.9
[reward]
rules = ["distinct_words"]
[loss]
ties = "first"
[optimizer]
learning_rate = 5e-7
moments = "$dtype"
[checkpoint]
every_steps = 1000000
T
  # Peak resident memory as the system counts it, with the final checkpoint.
  /usr/bin/time -f '%M' -o "$work/rss" "${REHEARSAL:-$here/target/release/rehearsal}" run "$work/job.toml" > "$work/log"
  "$python" - "$work/job/history.jsonl" "$(tail -1 "$work/rss")" <<'P'
import json, statistics, sys
rows = [json.loads(l) for l in open(sys.argv[1])]
phases = {k: round(statistics.median(r["seconds"][k] for r in rows), 2) for k in rows[0]["seconds"]}
print(json.dumps({"peer": "rehearsal", "step_s_median": phases["total"], "peak_rss_gb": int(sys.argv[2]) / 1e6, "phases": phases,
                  "generated": rows[0]["generated_tokens"], "all": [round(r["seconds"]["total"], 1) for r in rows]}))
P
}
for round in $(seq "$rounds"); do
  "$python" "$trl" --model "$hf" --prompts-file "$work/prompts.jsonl" --max-prompt-chars "$chars" --steps "$steps" \
    $([ "$dtype" = bf16 ] && echo --bf16) 2>/dev/null | tail -1 | tee -a "$work/trl"
  ours | tee -a "$work/ours"
done
"$python" - "$work/trl" "$work/ours" <<'P'
import json, statistics, sys
trl, ours = ([json.loads(l) for l in open(f)] for f in sys.argv[1:])
for key in ("step_s_median", "peak_rss_gb"):
    ratios = [o[key] / t[key] for o, t in zip(ours, trl)]
    print(f"{key}: rehearsal / trl = {statistics.median(ratios):.2f}  (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")
P
