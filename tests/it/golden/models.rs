use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var, safetensors};
use rehearsal_learn::{
    AdamW, AdamWConfig, NllReduction, PreferenceConfig, PreferenceKind, PreferenceLogprobs, Whole, clip_scale,
    global_norm, preference_loss, sft, token,
};
use rehearsal_lm::generate::{Generator, Options, Request, Sampling};
use rehearsal_lm::ops::Kernels;
use rehearsal_lm::{Architecture, Batch, Decoder, Gradients, Parameters, Sequence};

use super::{Golden, flat, folder, rows};

/// A model folder; it has no tokenizer, so the weights are read as they are.
fn parameters(model: &str) -> (Architecture, Parameters) {
    let folder = folder().join(model);
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let architecture = Architecture::from_json(&serde_json::from_slice(&config).unwrap()).unwrap();
    let weights = safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    (architecture, weights.into_iter().collect())
}

fn trainable(model: &str, dtype: DType) -> Decoder {
    let (architecture, parameters) = parameters(model);
    let parameters = parameters.into_iter().map(|(n, t)| (n, t.to_dtype(dtype).unwrap())).collect();
    Decoder::trainable(architecture, parameters).unwrap()
}

/// Rows of a padded batch without their padding.
fn unpadded(golden: &Golden, side: &str) -> Vec<Vec<u32>> {
    let prefix = if side.is_empty() { String::new() } else { format!("{side}_") };
    let inputs = &golden.value["inputs"];
    let (ids, mask) = (rows(&inputs[format!("{prefix}input_ids")]), rows(&inputs[format!("{prefix}attention_mask")]));
    let keep = |(ids, mask): (&Vec<u32>, &Vec<u32>)| {
        ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id).collect()
    };
    ids.iter().zip(&mask).map(keep).collect()
}

fn kernels(dtype: DType) -> Vec<Kernels> {
    // The fused kernels are f32; f64 shows that the plain twins are exact.
    if dtype == DType::F32 { vec![Kernels::Fused, Kernels::Plain] } else { vec![Kernels::Plain] }
}

#[test]
fn golden_tiny_llama_forward_and_gradients() {
    let golden = Golden::load("tiny-llama/forward");
    for dtype in [DType::F32, DType::F64] {
        for kernels in kernels(dtype) {
            let decoder = trainable("tiny-llama", dtype).with_kernels(kernels);
            for side in ["right", "left"] {
                let sequences = unpadded(&golden, side);
                // Every token but the first is a target: the first stands as the prompt.
                let batch = Batch::new(sequences.iter().map(|s| Sequence { prompt: &s[..1], completion: &s[1..] }));
                let forward = decoder.forward(&batch, 1.0).unwrap();
                let logprobs = forward.logprobs();
                let want: Vec<f64> = (golden.output(&format!("{side}_logprobs")).iter())
                    .zip(golden.output(&format!("{side}_label_mask")))
                    .filter(|(_, m)| *m == 1.0)
                    .map(|(x, _)| *x)
                    .collect();
                golden.check_values(&format!("{side}_logprobs"), &flat(&logprobs), &want, dtype == DType::F32);
                let whole = Whole { sequences: sequences.len(), tokens: batch.scored() };
                let nll = sft::nll(&logprobs, batch.spans(), NllReduction::TokenMean, whole).unwrap();
                golden.check(&format!("{side}_nll"), &nll);
                if side == "right" {
                    let n = batch.scored();
                    let grad = Tensor::full(-1.0 / n as f64, n, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                    let mut gradients = Gradients::default();
                    forward.backward(&grad, &mut gradients).unwrap();
                    let gradients = gradients.complete(&decoder).unwrap();
                    golden.check_gradients("right_grads", &gradients, dtype == DType::F32);
                    check_all_gradients(&golden, &gradients);
                    let norm = global_norm(&gradients).unwrap();
                    golden.check_numbers("right_grad_global_norm", &[norm], true);
                }
            }
        }
    }
}

/// Every entry of every gradient, where the folder has them.
fn check_all_gradients(golden: &Golden, gradients: &BTreeMap<String, Tensor>) {
    let want = safetensors::load(folder().join("tiny-llama/grads_right.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(want.len(), gradients.len());
    for (name, want) in want {
        golden.check_values(&name, &flat(&gradients[&name]), &flat(&want), true);
    }
}

#[test]
fn golden_tiny_llama_logits() {
    let golden = Golden::load("tiny-llama/forward");
    let want = safetensors::load(folder().join("tiny-llama/expected.safetensors"), &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::F64] {
        for kernels in kernels(dtype) {
            let decoder = trainable("tiny-llama", dtype).with_kernels(kernels);
            for (row, ids) in unpadded(&golden, "right").iter().enumerate() {
                let got = decoder.logits(ids).unwrap();
                let want = want["right_logits"].get(row).unwrap().narrow(0, 0, ids.len()).unwrap();
                golden.check_values("right_logits", &flat(&got), &flat(&want), dtype == DType::F32);
            }
        }
    }
}

#[test]
fn golden_tiny_llama_greedy() {
    let golden = Golden::load("tiny-llama/forward");
    let decoder = trainable("tiny-llama", DType::F32);
    let want = rows(&golden.value["outputs"]["greedy_new_tokens"]);
    let requests = unpadded(&golden, "right").into_iter().enumerate();
    let requests = requests.map(|(i, p)| Request { id: i as u64, prompt: p.into() }).collect();
    let options = Options {
        sampling: Sampling { temperature: 0.0, ..Default::default() },
        max_new_tokens: golden.param("max_new_tokens") as usize,
        min_new_tokens: 0,
        eos: vec![],
        stop: vec![],
        seed: 0,
        batch: 3,
    };
    let mut seen = 0;
    Generator::new(&decoder)
        .unwrap()
        .generate(requests, &options, None, &|| false, &mut |c| {
            assert_eq!(c.tokens, want[c.id as usize]);
            seen += 1;
        })
        .unwrap();
    assert_eq!(seen, want.len());
}

#[test]
fn golden_tiny_llama_dpo_step() {
    let golden = Golden::load("tiny-llama/dpo_step");
    for dtype in [DType::F32, DType::F64] {
        for kernels in kernels(dtype) {
            dpo_step(&golden, dtype, kernels);
        }
    }
}

fn dpo_step(golden: &Golden, dtype: DType, kernels: Kernels) {
    let params = &golden.value["params"];
    let single = dtype == DType::F32;
    let policy = trainable("tiny-llama", dtype).with_kernels(kernels);
    let reference = trainable(golden.param_text("reference").trim_start_matches("../"), dtype).with_kernels(kernels);

    let sequences = unpadded(golden, "");
    let completion_masks = rows(&golden.value["inputs"]["completion_mask"]);
    let prompts: Vec<usize> = completion_masks.iter().map(|m| m.iter().position(|&x| x == 1).unwrap()).collect();
    let batch =
        Batch::new(sequences.iter().zip(&prompts).map(|(s, &p)| Sequence { prompt: &s[..p], completion: &s[p..] }));
    let device = Device::Cpu;

    let forward = policy.forward(&batch, 1.0).unwrap();
    let logprobs = Var::from_tensor(&forward.logprobs()).unwrap();
    let ref_logprobs = reference.logprobs(&batch, 1.0).unwrap();
    let sums = token::span_sums(&logprobs, batch.spans()).unwrap();
    let ref_sums = token::span_sums(&ref_logprobs, batch.spans()).unwrap();
    golden.check("policy_logps", &sums);
    golden.check("ref_logps", &ref_sums);

    let pairs = sequences.len() / 2;
    let half = |t: &Tensor, which: usize| t.narrow(0, which * pairs, pairs).unwrap();
    let tokens: Vec<f32> = batch.spans().windows(2).map(|w| (w[1] - w[0]) as f32).collect();
    let tokens = Tensor::new(tokens, &device).unwrap().to_dtype(dtype).unwrap();
    let config = PreferenceConfig { kind: PreferenceKind::Sigmoid, beta: golden.param("beta"), ..Default::default() };
    let loss = preference_loss(
        &PreferenceLogprobs {
            policy_chosen: &half(&sums, 0),
            policy_rejected: &half(&sums, 1),
            ref_chosen: &half(&ref_sums, 0),
            ref_rejected: &half(&ref_sums, 1),
            chosen_tokens: &half(&tokens, 0),
            rejected_tokens: &half(&tokens, 1),
            score_gap: None,
        },
        &config,
    )
    .unwrap();
    let mean = loss.losses.mean_all().unwrap();
    golden.check("loss", &mean);
    golden.check("chosen_rewards", &loss.chosen_rewards);
    golden.check("rejected_rewards", &loss.rejected_rewards);

    let grad = mean.backward().unwrap().remove(&logprobs).unwrap();
    let mut gradients = Gradients::default();
    forward.backward(&grad, &mut gradients).unwrap();
    let gradients = gradients.complete(&policy).unwrap();
    golden.check_gradients("grads", &gradients, single);

    let settings = &params["optimizer"];
    let number = |key: &str| settings[key].as_f64();
    let config = AdamWConfig {
        beta1: settings["betas"][0].as_f64().unwrap(),
        beta2: settings["betas"][1].as_f64().unwrap(),
        eps: number("eps").unwrap(),
        weight_decay: number("weight_decay").unwrap_or(0.0),
        ..Default::default()
    };
    assert_eq!(settings["decay_rule"], "ndim >= 2");
    let norm = global_norm(&gradients).unwrap();
    golden.check_numbers("grad_global_norm", &[norm], single);
    let mut optimiser = AdamW::new(policy.variables(), config).unwrap();
    optimiser
        .step(policy.variables(), &gradients, number("lr").unwrap(), clip_scale(norm, number("max_norm")))
        .unwrap();

    let after = token::span_sums(&policy.logprobs(&batch, 1.0).unwrap(), batch.spans()).unwrap();
    golden.check("policy_logps_after_step", &after);
    let atol = params["params_after_atol"][if single { "f32" } else { "f64" }].as_f64().unwrap();
    let want =
        safetensors::load(folder().join("tiny-llama").join(golden.param_text("params_after_file")), &device).unwrap();
    for (name, want) in want {
        for (got, want) in flat(&policy.parameters()[&name]).iter().zip(flat(&want)) {
            assert!((got - want).abs() <= atol, "{name}: {got} {want}");
        }
    }
}
