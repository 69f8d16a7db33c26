//! Out and back: exported models in `transformers`, exported ledgers in TRL's form.

use std::process::Command;

use rehearsal::lm::Checkpoint;
use serde_json::Value;

use crate::support::parts::Part;
use crate::support::{job_file, python, python_with, rehearsal, stderr};

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
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig,
                          Qwen2Config, Qwen3Config)
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
    'qwen 2, windows from the second layer': (Qwen2Config(**common, use_sliding_window=True, sliding_window=6, max_window_layers=1), 'float32', '5GB'),
    'qwen 3': (Qwen3Config(**common, head_dim=24), 'bfloat16', '5GB'),
    'gemma 2': (Gemma2Config(**common, head_dim=16, query_pre_attn_scalar=20, sliding_window=6), 'float32', '5GB'),
    'gemma 3': (Gemma3TextConfig(**dict(common, num_hidden_layers=7), head_dim=16, query_pre_attn_scalar=16, sliding_window=6), 'float32', '60KB'),
    'gpt 2': (GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128), 'float32', '5GB'),
}
said = {}
for name, (config, dtype, shard) in cases.items():
    directory = sys.argv[1] + '/' + name
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0 if p.dim() > 1 or 'Gemma' in type(model).__name__ else 1.0, 0.1)
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
    assert_eq!(said.len(), 10);
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

const SCORES: &str = "
import json, sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    print(json.dumps([model(torch.tensor([ids])).logits[0, 0].item() for ids in json.loads(sys.argv[2])]))
";

#[test]
fn an_exported_reward_model_scores_the_same_in_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let base = rehearsal::embedded::model().unwrap().with_score_head(5).unwrap();
    base.save(&base.parameters, folder.path(), candle_core::DType::F32).unwrap();
    let read = Checkpoint::open(folder.path()).unwrap();
    let eos = read.architecture.eos[0];
    // The padding, wherever it is the end-of-sequence token too, is not what the score is read at.
    let sequences = [vec![5u32, 6, 7, 8], vec![9, 10, eos], vec![11, 12, 13, 14, 15, eos]];
    let decoder = read.frozen(&candle_core::Device::Cpu, candle_core::DType::F32).unwrap();
    let ends = sequences
        .iter()
        .map(|s| rehearsal::lm::Sequence { prompt: &[], completion: read.architecture.scored_prefix(s) });
    let got: Vec<f32> = decoder.values(&rehearsal::lm::Batch::ends(ends)).unwrap().to_vec1().unwrap();
    let Some(python) = python() else { return };
    let ids = serde_json::to_string(&sequences).unwrap();
    let output = Command::new(python).args(["-c", SCORES]).arg(folder.path()).arg(ids).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let want: Vec<f32> = serde_json::from_slice(&output.stdout).unwrap();
    for (got, want) in got.iter().zip(&want) {
        assert!((got - want).abs() < 1e-4, "{got} {want}");
    }
}

const PEFT: &str = "
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32), sys.argv[2])
ids = list(range(5, 40))
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0].tolist()
model.save_pretrained(sys.argv[3])
print(json.dumps({'ids': ids, 'logits': logits}))
";

#[test]
fn adapters_go_to_peft_and_back() {
    use candle_core::{DType, Device, Tensor};
    use rehearsal::lm::{Lora, LoraConfig};
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut base = rehearsal::embedded::model().unwrap();
    base.save(&base.parameters, &path("base"), DType::F32).unwrap();
    let targets = ["q_proj", "up_proj"].map(String::from).to_vec();
    let lora = Lora::new(&base, LoraConfig { rank: 3, alpha: 9.0, targets }, &Device::Cpu, 7).unwrap();
    for (name, var) in lora.variables() {
        let stream = rehearsal::lm::random::Stream::new(1, name.len() as u64);
        let data: Vec<f32> = (0..var.elem_count() as u64).map(|i| 0.05 * stream.normal(i) as f32).collect();
        var.set(&Tensor::from_vec(data, var.dims(), &Device::Cpu).unwrap()).unwrap();
    }
    lora.save(&base, &path("adapter")).unwrap();
    let merged = lora.merged(&base, &Device::Cpu).unwrap();
    let Some(python) = python_with(Part::Peft, "transformers, torch, peft") else { return };
    let folders = [path("base"), path("adapter"), path("theirs")];
    let output = Command::new(python).args(["-c", PEFT]).args(&folders).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let theirs = Lora::open(&base, &folders[2], &Device::Cpu).unwrap();
    for (name, weight) in theirs.merged(&base, &Device::Cpu).unwrap() {
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&weight), flat(&merged[&name]), "{name}");
    }
    base.parameters.extend(merged);
    check_logits("PEFT", &base, &serde_json::from_slice(&output.stdout).unwrap());
}

const PARQUET: &str = "
import sys, pandas
pandas.DataFrame([
    {'messages': [{'role': 'user', 'content': f'Who {i}?'}, {'role': 'assistant', 'content': f'The dog {i}.'}]} for i in range(12)
]).to_parquet(sys.argv[1] + '/messages.parquet')
pandas.DataFrame([
    {'prompt': f'Who {i}?', 'chosen': f'The dog {i}.', 'rejected': 'Nobody.'} for i in range(12)
]).to_parquet(sys.argv[1] + '/pairs.parquet')
";

#[test]
fn parquet_files_are_read_like_json_lines() {
    let Some(python) = python_with(Part::Parquet, "pandas, pyarrow") else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(python).args(["-c", PARQUET]).arg(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    for (algorithm, file) in [("sft", "messages.parquet"), ("dpo", "pairs.parquet")] {
        let job = format!(
            "[job]\ndirectory = \"{algorithm}\"\nalgorithm = \"{algorithm}\"\nsteps = 2\n[data]\ntrain = [\"{file}\"]\n"
        );
        let path = folder.path().join(format!("{algorithm}.toml"));
        std::fs::write(&path, job).unwrap();
        let output = rehearsal(&["run", path.to_str().unwrap()]);
        assert!(output.status.success(), "{algorithm}: {}", stderr(&output));
        assert!(crate::support::stdout(&output).contains("12 rows"), "{}", crate::support::stdout(&output));
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
    let Some(python) = python_with(Part::Trl, "datasets, trl") else { return };
    let output = Command::new(python).args(["-c", DATASET]).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), lines.len().to_string());
}

const ENCODERS: &str = "
import json, sys, torch
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertForSequenceClassification, PreTrainedTokenizerFast
torch.manual_seed(1)
words = '[PAD] [UNK] [CLS] [SEP] the fox is quick dog sleeps who what a and . ?'.split()
inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
inner.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
tok = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]',
                              model_input_names=['input_ids', 'token_type_ids', 'attention_mask'])
sizes = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=24, initializer_range=0.5)
rows = json.load(open(sys.argv[2]))
out = {}
for name, labels in [('similarity', 0), ('one', 1), ('two', 2)]:
    config = BertConfig(**sizes, **({'num_labels': labels} if labels else {}))
    model = (BertForSequenceClassification if labels else BertModel)(config).eval()
    folder = Path(sys.argv[1]) / name
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    with torch.no_grad():
        if labels:
            def score(r):
                x = tok(r['prompt'], r['completion'], return_tensors='pt', truncation=True, max_length=24)
                logits = model(**x).logits[0].double()
                return (logits[1] - logits[0]).item() if labels == 2 else logits[0].item()
        else:
            def mean(t):
                return model(**tok(t, return_tensors='pt', truncation=True, max_length=24)).last_hidden_state[0].double().mean(0)
            def score(r):
                return torch.cosine_similarity(mean(r['completion']), mean(r['answer']), dim=0).item()
        out[name] = [score(r) for r in rows]
print(json.dumps(out))
";

#[test]
fn encoders_score_as_transformers_does() {
    use rehearsal::{Reward, Sample, judge::Devices, rewards::EncoderReward, transformers::BertEncoder};
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let samples: Vec<Sample> = [
        ("who is quick ?", "the fox is quick .", "the fox"),
        ("what sleeps ?", "a dog and a fox and unknown", "the dog sleeps ."),
        ("who ?", &"the fox and the dog ".repeat(9), "the fox and the dog"),
    ]
    .into_iter()
    .map(|(prompt, completion, answer)| Sample {
        prompt: prompt.into(),
        completion: completion.into(),
        answer: Some(answer.into()),
        ..Sample::default()
    })
    .collect();
    let rows: Vec<Value> = samples
        .iter()
        .map(|s| serde_json::json!({"prompt": s.prompt, "completion": s.completion, "answer": s.answer}))
        .collect();
    let file = folder.path().join("rows.json");
    std::fs::write(&file, Value::from(rows).to_string()).unwrap();
    let output = Command::new(python).args(["-c", ENCODERS]).arg(folder.path()).arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let wanted: Value = serde_json::from_slice(&output.stdout).unwrap();
    for name in ["similarity", "one", "two"] {
        let encoder = BertEncoder::open(&folder.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let encoder = EncoderReward::new(encoder.into(), Devices::new(1).unwrap());
        let scores = encoder.score(&samples).unwrap();
        for (got, want) in scores.iter().zip(wanted[name].as_array().unwrap()) {
            let want = want.as_f64().unwrap();
            assert!((got.score - want).abs() < 1e-4, "{name}: {} for {want}", got.score);
        }
        let bare = Sample { answer: None, ..samples[0].clone() };
        assert_eq!(encoder.score(&[bare]).is_err(), name == "similarity");
    }
}

const CAUSAL_MODELS: &str = "
import json, sys, torch
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
torch.manual_seed(2)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
inner.decoder = decoders.ByteLevel()
tok = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token='!', pad_token='!')
tok.chat_template = '{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}assistant:'
sizes = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=2048, initializer_range=0.3, pad_token_id=0, eos_token_id=0, bos_token_id=0)
more = {
    'phi3': {}, 'olmo': {}, 'olmo2': {}, 'starcoder2': {}, 'gemma': {'head_dim': 8}, 'helium': {'head_dim': 8},
    'smollm3': {},
}
out = {}
for kind, extra in more.items():
    config = AutoConfig.for_model(kind, **sizes, **extra)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    folder = Path(sys.argv[1]) / kind
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    # Older programs, and candle, read the base of the rope at the top of the file.
    file = folder / 'config.json'
    written = json.loads(file.read_text())
    written.setdefault('rope_theta', (written.get('rope_parameters') or {}).get('rope_theta', 10000.0))
    written['rope_scaling'] = None
    written.setdefault('hidden_activation', None)
    file.write_text(json.dumps(written))
    text = tok.apply_chat_template(json.load(open(sys.argv[2])), tokenize=False)
    with torch.no_grad():
        logits = model(torch.tensor([tok(text, add_special_tokens=False).input_ids])).logits[0, -1].double()
    one, two = (tok(d, add_special_tokens=False).input_ids[0] for d in '12')
    out[kind] = torch.sigmoid(logits[one] - logits[two]).item()
print(json.dumps(out))
";

#[test]
fn models_that_cannot_be_trained_judge_as_they_do_in_transformers() {
    use rehearsal::Sample;
    use rehearsal::judge::{Judge, JudgeModel, LocalJudge, ReplyFormat, Template};
    use rehearsal::transformers::CausalModel;
    use std::sync::Arc;
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sample =
        |completion: &str| Sample { prompt: "Who?".into(), completion: completion.into(), ..Sample::default() };
    let question =
        Template::new("brief", None, ReplyFormat::Token).unwrap().pair(&sample("The fox."), &sample("I do not know."));
    let messages = serde_json::json!([
        {"role": "system", "content": question.system}, {"role": "user", "content": question.text}
    ]);
    let file = folder.path().join("messages.json");
    std::fs::write(&file, messages.to_string()).unwrap();
    let output = Command::new(python).args(["-c", CAUSAL_MODELS]).arg(folder.path()).arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let wanted: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (kind, want) in wanted.as_object().unwrap() {
        let directory = folder.path().join(kind);
        assert!(CausalModel::supports(&directory));
        let model = JudgeModel::Transformers(Arc::new(
            CausalModel::open(&directory, None).unwrap_or_else(|e| panic!("{kind}: {e}")),
        ));
        let devices = rehearsal::judge::Devices::new(1).unwrap();
        let judge = LocalJudge::new(model, Default::default(), Default::default(), &devices).unwrap();
        // Asked twice: nothing of the first question is left for the second.
        for _ in 0..2 {
            let reply = judge.ask(std::slice::from_ref(&question)).unwrap().remove(0);
            let (got, want) = (reply.verdict.unwrap().first().unwrap(), want.as_f64().unwrap());
            assert!((got - want).abs() < 1e-4, "{kind}: {got} for {want}");
        }
    }
}
