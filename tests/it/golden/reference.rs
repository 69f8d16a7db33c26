//! Real models against what `transformers` said of them: needs their files, and says so when they are absent.

use std::path::PathBuf;

use candle_core::{DType, Device};
use rehearsal_lm::{Batch, Checkpoint, Message, Sequence};
use serde_json::Value;

use crate::support::parts::{Part, skip};

/// The folder of real models (`REHEARSAL_MODELS`, or `../shared/models` beside the checkout), if it is there.
fn models() -> Option<PathBuf> {
    let folder = std::env::var_os("REHEARSAL_MODELS").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/models"));
    let there = folder.is_dir();
    if !there {
        let what = format_args!("{} is not there; set REHEARSAL_MODELS to a folder of real models", folder.display());
        skip(Part::Models, what);
    }
    there.then_some(folder)
}

fn reference(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Teacher forcing: the log-probabilities of the reference's own greedy tokens.
fn check(checkpoint: &Checkpoint, reference: &Value) {
    let decoder = checkpoint.frozen(&Device::Cpu, DType::F32).unwrap();
    let numbers = |v: &Value| -> Vec<f64> { v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    let tokens = |v: &Value| -> Vec<u32> { numbers(v).iter().map(|&x| x as u32).collect() };
    for case in reference["cases"].as_array().unwrap() {
        let prompt = tokens(&case["prompt_ids"]);
        if let Some(messages) = case["messages"].as_array() {
            let messages: Vec<Message> = messages.iter().map(|m| serde_json::from_value(m.clone()).unwrap()).collect();
            assert_eq!(checkpoint.text.template().unwrap().render(&messages, true).unwrap(), case["prompt"]);
            assert_eq!(checkpoint.text.encode_chat(&messages).unwrap(), prompt);
        } else {
            assert_eq!(checkpoint.text.encode(case["prompt"].as_str().unwrap()).unwrap(), prompt);
        }
        let said = tokens(&case["greedy_ids"]);
        let batch = Batch::new([Sequence { prompt: &prompt, completion: &said }]);
        let got = decoder.logprobs(&batch, 1.0).unwrap().to_vec1::<f32>().unwrap();
        for (i, (got, want)) in got.iter().zip(numbers(&case["greedy_logprobs"])).enumerate() {
            // The reference is printed with five decimals.
            assert!((*got as f64 - want).abs() < 2e-4, "{}: token {i}: {got} {want}", case["prompt"]);
        }
        let top = case["last_position_top5"].as_array().unwrap();
        let lse = case["last_position_logsumexp"].as_f64().unwrap();
        for token in top {
            let id = [token["id"].as_u64().unwrap() as u32];
            let batch = Batch::new([Sequence { prompt: &prompt, completion: &id }]);
            let got = decoder.logprobs(&batch, 1.0).unwrap().to_vec1::<f32>().unwrap()[0] as f64;
            let want = token["logit"].as_f64().unwrap() - lse;
            assert!((got - want).abs() < 2e-4, "{}: token {}: {got} {want}", case["prompt"], token["token"]);
        }
        let batch = Batch::new([Sequence { prompt: &prompt[..1], completion: &prompt[1..] }]);
        let sum: f64 = decoder.logprobs(&batch, 1.0).unwrap().to_vec1::<f32>().unwrap().iter().map(|&x| x as f64).sum();
        let want = case["prompt_logprob_sum"].as_f64().unwrap();
        assert!((sum - want).abs() < 1e-4 * want.abs().max(1.0), "{}: {sum} {want}", case["prompt"]);
    }
}

#[test]
fn golden_stories260k_reference() {
    let Some(models) = models() else { return };
    check(&Checkpoint::open(&models.join("stories260k")).unwrap(), &reference("stories260k-reference.json"));
}

#[test]
fn golden_smollm2_reference() {
    let Some(path) = std::env::var_os("REHEARSAL_SMOLLM2") else {
        let what = "set REHEARSAL_SMOLLM2 to the GGUF of SmolLM2-135M-Instruct (docs/results.md says where it is)";
        skip(Part::Smollm2, what);
        return;
    };
    check(&Checkpoint::open(&PathBuf::from(path)).unwrap(), &reference("smollm2-reference.json"));
}
