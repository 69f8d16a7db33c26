use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var, safetensors};
use rehearsal_learn::reward::{Pairwise, PairwiseConfig, pairwise};
use rehearsal_learn::{BatchTotals, NllReduction, global_norm, sft};
use rehearsal_lm::generate::{Generator, Options, Request, Sampling};
use rehearsal_lm::ops::Kernels;
use rehearsal_lm::{Architecture, Batch, Decoder, Forward, Gradients, Parameters, Sequence};

use super::{Golden, flat, folder, rows};
use crate::gpu::board;

/// A model folder; it has no tokenizer, so the weights are read as they are.
fn parameters(model: &str) -> (Architecture, Parameters) {
    let folder = folder().join(model);
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let architecture = Architecture::from_json(&serde_json::from_slice(&config).unwrap()).unwrap();
    let weights = safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    (architecture, weights.into_iter().collect())
}

pub fn trainable(model: &str, dtype: DType) -> Decoder {
    let (architecture, parameters) = parameters(model);
    let parameters = parameters.into_iter().map(|(n, t)| (n, t.to_dtype(dtype).unwrap())).collect();
    Decoder::trainable(architecture, parameters).unwrap()
}

/// Rows of a padded batch without their padding.
pub fn unpadded(golden: &Golden, side: &str) -> Vec<Vec<u32>> {
    let prefix = if side.is_empty() { String::new() } else { format!("{side}_") };
    let inputs = &golden.value["inputs"];
    let (ids, mask) = (rows(&inputs[format!("{prefix}input_ids")]), rows(&inputs[format!("{prefix}attention_mask")]));
    let keep = |(ids, mask): (&Vec<u32>, &Vec<u32>)| {
        ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id).collect()
    };
    ids.iter().zip(&mask).map(keep).collect()
}

/// How a decoder runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    Kernels,
    Graph,
    /// The kernels of a GPU, on an emulated one or on a real one.
    Gpu,
}

impl Machine {
    pub fn run(self, decoder: Decoder) -> Decoder {
        match (self, board()) {
            (Self::Graph, _) => decoder.with_kernels(Kernels::Plain),
            (Self::Gpu, Some(board)) => board.on(&decoder),
            _ => decoder,
        }
    }
}

/// The kernels are f32; f64 shows that the graph is exact.
pub fn machines(dtype: DType) -> Vec<Machine> {
    match dtype {
        DType::F32 if board().is_some() => vec![Machine::Kernels, Machine::Graph, Machine::Gpu],
        DType::F32 => vec![Machine::Kernels, Machine::Graph],
        _ => vec![Machine::Graph],
    }
}

const FAMILIES: [&str; 6] = ["tiny-llama", "tiny-gpt2", "tiny-qwen2", "tiny-qwen3", "tiny-gemma2", "tiny-gemma3"];

fn golden_of(model: &str) -> Golden {
    Golden::load(&format!("{model}/forward"))
}

#[test]
fn golden_models_forward_and_gradients() {
    for model in FAMILIES {
        let golden = golden_of(model);
        for dtype in [DType::F32, DType::F64] {
            for machine in machines(dtype) {
                forward_and_gradients(model, &golden, dtype, machine);
            }
        }
    }
}

fn forward_and_gradients(model: &str, golden: &Golden, dtype: DType, machine: Machine) {
    let single = dtype == DType::F32;
    let decoder = machine.run(trainable(model, dtype));
    for side in ["right", "left"] {
        let sequences = unpadded(golden, side);
        // Every token but the first is a target: the first stands as the prompt.
        let batch = Batch::new(sequences.iter().map(|s| Sequence { prompt: &s[..1], completion: &s[1..] }));
        let forward = decoder.forward(&batch, 1.0).unwrap();
        let logprobs = forward.output();
        let want: Vec<f64> = (golden.output(&format!("{side}_logprobs")).iter())
            .zip(golden.output(&format!("{side}_label_mask")))
            .filter(|(_, m)| *m == 1.0)
            .map(|(x, _)| *x)
            .collect();
        golden.check_values(&format!("{side}_logprobs"), &flat(&logprobs), &want, single);
        let whole = BatchTotals { sequences: sequences.len(), tokens: batch.scored() };
        let nll = sft::nll(&logprobs, batch.spans(), NllReduction::TokenMean, whole).unwrap();
        golden.check(&format!("{side}_nll"), &nll);
        if side == "right" {
            let n = batch.scored();
            let grad = Tensor::full(-1.0 / n as f64, n, decoder.device()).unwrap().to_dtype(dtype).unwrap();
            let mut gradients = Gradients::default();
            forward.backward(&grad, &mut gradients).unwrap();
            let gradients = gradients.complete(&decoder).unwrap();
            golden.check_gradients("right_grads", &gradients, single);
            check_all_gradients(model, golden, &gradients);
            let norm = global_norm(&gradients).unwrap();
            golden.check_numbers("right_grad_global_norm", &[norm], true);
        }
    }
}

/// Every entry of every gradient, where the folder has them.
fn check_all_gradients(model: &str, golden: &Golden, gradients: &BTreeMap<String, Tensor>) {
    let file = folder().join(model).join("grads_right.safetensors");
    if !file.exists() {
        return;
    }
    let want = safetensors::load(file, &Device::Cpu).unwrap();
    assert_eq!(want.len(), gradients.len());
    for (name, want) in want {
        golden.check_values(&name, &flat(&gradients[&name]), &flat(&want), true);
    }
}

#[test]
fn golden_models_logits() {
    for model in FAMILIES {
        let golden = golden_of(model);
        let want = safetensors::load(folder().join(model).join("expected.safetensors"), &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::F64] {
            for machine in machines(dtype) {
                let decoder = machine.run(trainable(model, dtype));
                for (row, ids) in unpadded(&golden, "right").iter().enumerate() {
                    let got = decoder.logits(ids).unwrap();
                    let want = want["right_logits"].get(row).unwrap().narrow(0, 0, ids.len()).unwrap();
                    golden.check_values("right_logits", &flat(&got), &flat(&want), dtype == DType::F32);
                }
            }
        }
    }
}

#[test]
fn golden_models_greedy() {
    for model in FAMILIES {
        for machine in machines(DType::F32) {
            let golden = golden_of(model);
            let decoder = machine.run(trainable(model, DType::F32));
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
                    assert_eq!(c.tokens, want[c.id as usize], "{model}");
                    seen += 1;
                })
                .unwrap();
            assert_eq!(seen, want.len());
        }
    }
}

#[test]
fn golden_models_recall_what_they_generated() {
    for model in FAMILIES {
        let golden = golden_of(model);
        let decoder = trainable(model, DType::F32);
        let prompts: Vec<Arc<Vec<u32>>> = unpadded(&golden, "right").into_iter().map(Arc::new).collect();
        let request = |i: usize| Request { id: i as u64, prompt: prompts[i / 2].clone() };
        let options = Options {
            sampling: Sampling { temperature: 0.8, ..Default::default() },
            max_new_tokens: 12,
            min_new_tokens: 0,
            eos: vec![],
            stop: vec![],
            seed: 3,
            batch: 3,
        };
        let (mut all, requests) = (Vec::new(), (0..2 * prompts.len()).map(request).collect());
        let recorded = Generator::new(&decoder)
            .unwrap()
            .generate_recorded(requests, &options, None, &|| false, &mut |c| all.push(c), 1000)
            .unwrap()
            .unwrap();
        all.sort_by_key(|c| c.id);
        let sequences = all.iter().map(|c| Sequence { prompt: &prompts[c.id as usize / 2], completion: &c.tokens });
        let batch = Batch::new(sequences);
        assert!(recorded.covers(&batch, 0.8), "{model}");
        let back = |forward: Forward<'_>| {
            let output = forward.output();
            let mut gradients = Gradients::default();
            forward.backward(&output.sin().unwrap(), &mut gradients).unwrap();
            let named = gradients.complete(&decoder).unwrap().into_iter().map(|(name, t)| (name, flat(&t)));
            (flat(&output), named.collect::<Vec<_>>())
        };
        let want = back(decoder.forward(&batch, 0.8).unwrap());
        assert_eq!(back(decoder.forward_recalled(&batch, 0.8, recorded).unwrap()), want, "{model}");
    }
}

#[test]
fn golden_reward_model_scores_and_gradients() {
    let golden = golden_of("tiny-llama-rm");
    for dtype in [DType::F32, DType::F64] {
        for machine in machines(dtype) {
            let single = dtype == DType::F32;
            let decoder = machine.run(trainable("tiny-llama-rm", dtype));
            for side in ["right", "left"] {
                let sequences = unpadded(&golden, side);
                // Every row is read: a token that nothing sees stands at the end.
                let all: Vec<Vec<u32>> = sequences.iter().map(|s| [&s[1..], &[0]].concat()).collect();
                let batch =
                    Batch::new(sequences.iter().zip(&all).map(|(s, c)| Sequence { prompt: &s[..1], completion: c }));
                let values = flat(&decoder.values(&batch).unwrap());
                let mask = rows(&golden.value["inputs"][format!("{side}_attention_mask")]).concat();
                let want: Vec<f64> = (golden.output(&format!("{side}_values")).into_iter().zip(mask))
                    .filter(|(_, m)| *m == 1)
                    .map(|(v, _)| v)
                    .collect();
                golden.check_values(&format!("{side}_values"), &values, &want, single);
                let batch = ends(&decoder, &sequences);
                golden.check(&format!("{side}_scores"), &decoder.values(&batch).unwrap());
            }
            let sequences = unpadded(&golden, "right");
            let forward = decoder.forward_values(&ends(&decoder, &sequences)).unwrap();
            let scores = Var::from_tensor(&forward.output()).unwrap();
            let half = |which: usize| scores.narrow(0, which * sequences.len() / 2, sequences.len() / 2).unwrap();
            let (chosen, rejected) = (half(0), half(1));
            let pairs = Pairwise { chosen: &chosen, rejected: &rejected, margin: None, probability: None };
            let loss = pairwise(&pairs, &PairwiseConfig::default()).unwrap().mean_all().unwrap();
            golden.check("pairwise_loss", &loss);
            let right = flat(&chosen).iter().zip(flat(&rejected)).filter(|(c, r)| *c > r).count();
            golden.check_numbers("pairwise_accuracy", &[right as f64 / (sequences.len() / 2) as f64], true);
            let grad = loss.backward().unwrap().remove(&scores).unwrap();
            let mut gradients = Gradients::default();
            forward.backward(&grad, &mut gradients).unwrap();
            let gradients = gradients.complete(&decoder).unwrap();
            golden.check_gradients("pairwise_grads", &gradients, single);
            golden.check_numbers("pairwise_grad_global_norm", &[global_norm(&gradients).unwrap()], true);
        }
    }
}

/// Sequences of which the score is read, where the model's padding says.
fn ends(decoder: &Decoder, sequences: &[Vec<u32>]) -> Batch {
    let read = |s: &Vec<u32>| decoder.architecture().scored_prefix(s).to_vec();
    let sequences: Vec<Vec<u32>> = sequences.iter().map(read).collect();
    Batch::ends(sequences.iter().map(|s| Sequence { prompt: &[], completion: s }))
}
