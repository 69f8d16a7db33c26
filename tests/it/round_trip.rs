//! Out and back: exported models in `transformers`, exported ledgers in TRL's form.

use std::process::Command;

use rehearsal::lm::Checkpoint;
use serde_json::Value;

use crate::support::{job_file, rehearsal, stderr};

/// A Python that has `transformers` and `torch` (`REHEARSAL_PYTHON`, or `python3`).
fn python() -> Option<String> {
    let python = std::env::var("REHEARSAL_PYTHON").unwrap_or_else(|_| "python3".into());
    let found =
        Command::new(&python).args(["-c", "import transformers, torch"]).output().is_ok_and(|o| o.status.success());
    if !found {
        crate::support::skipped!("{python} has no transformers and torch; set REHEARSAL_PYTHON to one that has");
    }
    found.then_some(python)
}

const LOGITS: &str = "
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tok = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tok.apply_chat_template([{'role': 'user', 'content': 'What does the fox do?'}], add_generation_prompt=True, tokenize=False)
ids = tok(prompt, add_special_tokens=False).input_ids
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0].double()
print(json.dumps({'prompt': prompt, 'ids': ids, 'logits': logits.tolist()}))
";

#[test]
fn an_exported_model_says_the_same_in_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 3, "");
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    let out = folder.path().join("model");
    let output = rehearsal(&["export", directory.to_str().unwrap(), "--model", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));

    let checkpoint = Checkpoint::open(&out).unwrap();
    let Some(python) = python() else { return };
    let output = Command::new(python).args(["-c", LOGITS]).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let messages = [rehearsal::lm::Message::user("What does the fox do?")];
    let ids = checkpoint.text.encode_chat(&messages).unwrap();
    assert_eq!(checkpoint.text.template().unwrap().render(&messages, true).unwrap(), said["prompt"].as_str().unwrap());
    assert_eq!(ids, serde_json::from_value::<Vec<u32>>(said["ids"].clone()).unwrap());
    check_logits("exported", &checkpoint, &said);
}

const FAMILY: &str = "
import json, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
torch.manual_seed(0)
common = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=512, bos_token_id=1, eos_token_id=3, pad_token_id=0, attn_implementation='eager')
llama3 = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
cases = {
    'separate head, odd head width': (LlamaConfig(**common, head_dim=24, tie_word_embeddings=False), 'float32', '5GB'),
    'llama 3 scaling, sharded': (LlamaConfig(**common, rope_parameters=llama3), 'float32', '60KB'),
    'linear scaling': (LlamaConfig(**common, rope_parameters=dict(rope_type='linear', rope_theta=10000.0, factor=4.0)), 'float32', '5GB'),
    'biases, bf16': (LlamaConfig(**common, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), 'bfloat16', '5GB'),
    'mistral window, f16': (MistralConfig(**common, sliding_window=7), 'float16', '5GB'),
}
said = {}
for name, (config, dtype, shard) in cases.items():
    directory = sys.argv[1] + '/' + name
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0 if p.dim() > 1 else 1.0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation='eager')
    ids = torch.randint(4, 512, (1, 40))
    with torch.no_grad():
        said[name] = {'ids': ids[0].tolist(), 'logits': model(ids).logits[0].tolist()}
print(json.dumps(said))
";

#[test]
fn models_made_by_transformers_say_the_same_here() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(python).args(["-c", FAMILY]).arg(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let said: serde_json::Map<String, Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said.len(), 5);
    let embedded = rehearsal::embedded::model().unwrap();
    for (name, want) in said {
        let directory = folder.path().join(&name);
        std::fs::write(directory.join("tokenizer.json"), embedded.text.tokenizer_json()).unwrap();
        let checkpoint = Checkpoint::open(&directory).unwrap_or_else(|e| panic!("{name}: {e}"));
        check_logits(&name, &checkpoint, &want);
    }
}

/// Logits of every position against those of `transformers`, within 1e-4.
fn check_logits(name: &str, checkpoint: &Checkpoint, said: &Value) {
    let ids: Vec<u32> = serde_json::from_value(said["ids"].clone()).unwrap();
    let decoder = checkpoint.frozen(&candle_core::Device::Cpu, candle_core::DType::F32).unwrap();
    let got = decoder.logits(&ids).unwrap().to_vec2::<f32>().unwrap();
    let want = said["logits"].as_array().unwrap();
    assert_eq!(got.len(), want.len());
    for (position, (got, want)) in got.iter().zip(want).enumerate() {
        for (token, (got, want)) in got.iter().zip(want.as_array().unwrap()).enumerate() {
            let want = want.as_f64().unwrap();
            assert!((f64::from(*got) - want).abs() < 1e-4, "{name}: position {position}, token {token}: {got} {want}");
        }
    }
}

const DATASET: &str = "
import sys
from datasets import load_dataset
from trl.data_utils import is_conversational, maybe_extract_prompt
rows = load_dataset('json', data_files=sys.argv[1], split='train')
row = rows[0]
assert {'prompt', 'chosen', 'rejected'} <= set(rows.column_names), rows.column_names
assert not is_conversational(row) and maybe_extract_prompt(row)['prompt'] == row['prompt']
assert all(r['chosen'] != r['rejected'] and r['score_chosen'] > r['score_rejected'] for r in rows)
print(len(rows))
";

#[test]
fn an_exported_ledger_is_a_preference_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 3, "");
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    let out = folder.path().join("pairs.jsonl");
    let output = rehearsal(&["export", directory.to_str().unwrap(), "--ledger", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let lines: Vec<Value> =
        std::fs::read_to_string(&out).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(!lines.is_empty() && lines.len() <= 12);
    for row in &lines {
        for column in ["prompt", "chosen", "rejected"] {
            assert!(row[column].is_string(), "{row}");
        }
        assert!(row["score_chosen"].as_f64() > row["score_rejected"].as_f64(), "{row}");
    }
    let Some(python) = python() else { return };
    if !Command::new(&python).args(["-c", "import datasets, trl"]).output().is_ok_and(|o| o.status.success()) {
        crate::support::skipped!("{python} has no datasets and trl");
        return;
    }
    let output = Command::new(python).args(["-c", DATASET]).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), lines.len().to_string());
}
