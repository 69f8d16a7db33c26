#!/usr/bin/env bash
# Compares TRL and Rehearsal on the same PPO work, in turn, and prints the ratios of update time and peak memory.
#
#   [DTYPE=f32|bf16] scripts/compare_trl_ppo.sh PYTHON TRL_SCRIPT HF_DIR PROMPTS.jsonl [ROUNDS] [STEPS]
#
# PYTHON has trl 0.24, transformers 4 and torch 2.15. TRL_SCRIPT runs TRL's PPOTrainer on STEPS updates of 16 prompts x 1
# completion of 48 new tokens, one epoch, one minibatch, with policy, reference, reward model and value model of the same
# size, and prints one JSON line with step_s_median and peak_rss_gb. HF_DIR is the model as a Hugging Face directory.
# With bf16 TRL keeps everything in bf16; Rehearsal keeps weights and gradients in f32 and the moments in bf16.
set -euo pipefail
python=$1 trl=$2 hf=$(realpath "$3") prompts=$4 rounds=${5:-2} steps=${6:-3}
dtype=${DTYPE:-f32}
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
[ -n "${REHEARSAL:-}" ] || cargo build --release --manifest-path "$here/Cargo.toml" >&2

"$python" - "$prompts" "$work" "$steps" "$hf" <<'P'
import json, shutil, sys, torch
from transformers import AutoModelForSequenceClassification
prompts, work, steps, hf = sys.argv[1:]
rows = [p for p in (json.loads(l)["prompt"] for l in open(prompts)) if isinstance(p, str) and len(p) <= 120]
open(work + "/prompts.jsonl", "w").writelines(json.dumps({"prompt": r}) + "\n" for r in rows[: 16 * (int(steps) + 1)])
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(hf, num_labels=1, dtype=torch.float32)
model.save_pretrained(work + "/reward")
for name in ["tokenizer.json", "tokenizer_config.json"]:
    shutil.copy(f"{hf}/{name}", work + "/reward")
P
ours() {
  rm -rf "$work/job"
  cat > "$work/job.toml" <<T
[job]
directory = "job"
algorithm = "ppo"
steps = $steps
[model]
policy = "$hf"
dtype = "$dtype"
[prompts]
train = "prompts.jsonl"
[rollout]
prompts_per_step = 16
completions_per_prompt = 1
max_new_tokens = 48
min_new_tokens = 48
temperature = 0.9
[reward]
models = ["reward"]
[optimizer]
learning_rate = 3e-6
moments = "$dtype"
[checkpoint]
every_steps = 1000000
T
  /usr/bin/time -f '%M' -o "$work/rss" "${REHEARSAL:-$here/target/release/rehearsal}" run "$work/job.toml" > "$work/log"
  "$python" - "$work/job/history.jsonl" "$(tail -1 "$work/rss")" <<'P'
import json, statistics, sys
rows = [json.loads(l) for l in open(sys.argv[1])]
phases = {k: round(statistics.median(r["seconds"][k] for r in rows), 2) for k in rows[0]["seconds"]}
print(json.dumps({"peer": "rehearsal", "step_s_median": phases["total"], "peak_rss_gb": int(sys.argv[2]) / 1e6, "phases": phases,
                  "all": [round(r["seconds"]["total"], 1) for r in rows]}))
P
}
theirs() {
  flag=$([ "$dtype" = bf16 ] && echo --bf16 || true)
  # shellcheck disable=SC2086
  "$python" "$trl" --model "$hf" --prompts-file "$work/prompts.jsonl" --steps "$steps" $flag 2>/dev/null | grep step_s_median
}
for round in $(seq "$rounds"); do
  echo "round $round"
  a=$(theirs); b=$(ours)
  echo "  TRL       $a"; echo "  Rehearsal $b"
  "$python" -c 'import json,sys; a,b=map(json.loads,sys.argv[1:]); print("  ratio of time %.2f, of memory %.2f" % (b["step_s_median"]/a["step_s_median"], b["peak_rss_gb"]/a["peak_rss_gb"]))' "$a" "$b"
done
