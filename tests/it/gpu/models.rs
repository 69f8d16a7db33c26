//! Whole passes on the emulated GPU backend, compared with the CPU kernels. (The golden tests compare it with
//! transformers.)

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use rehearsal::lm::generate::{Completion, Generator, Options, Request, Sampling};
use rehearsal::lm::random::Stream;
use rehearsal::lm::{Architecture, Batch, Decoder, Gradients, Precision, Sequence};
use rehearsal_learn::{AdamW, AdamWConfig, MomentType, global_norm, global_norm_on};

use super::{Board, Emulator, board};
use crate::support::small::weights;

/// A small model of a family, with random weights. Heads are not a multiple of 16 wide unless `dim` is.
pub fn model(family: &str, dim: usize, more: serde_json::Value) -> Decoder {
    let mut config = serde_json::json!({
        "model_type": family, "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": dim, "intermediate_size": 40, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let architecture = Architecture::from_json(&config).unwrap();
    let parameters = weights(&architecture, 9);
    Decoder::trainable(architecture, parameters).unwrap()
}

/// Prompts shared and not, longer than a tile and shorter, some completions empty.
fn sequences() -> Vec<(Vec<u32>, Vec<u32>)> {
    let long: Vec<u32> = (0..70).map(|i| (i * 7 + 3) % 61).collect();
    vec![
        (long.clone(), vec![4, 5, 6]),
        (long.clone(), (0..66).map(|i| (i * 5) % 61).collect()),
        (long, vec![]),
        (vec![8, 9], vec![10, 11, 12, 13]),
        (vec![], vec![14, 15, 16]),
    ]
}

type Named = BTreeMap<String, Vec<f32>>;

fn floats(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn step(decoder: &Decoder) -> (Vec<f32>, Named) {
    let sequences = sequences();
    let batch = Batch::new(sequences.iter().map(|(prompt, completion)| Sequence { prompt, completion })).with_entropy();
    let forward = decoder.forward(&batch, 0.9).unwrap();
    let output = floats(&forward.output());
    let grad: Vec<f32> = (0..output.len()).map(|i| (i % 5) as f32 * 0.1 - 0.17).collect();
    let mut gradients = Gradients::default();
    forward.backward(&Tensor::new(grad, decoder.device()).unwrap(), &mut gradients).unwrap();
    let gradients = gradients.complete(decoder).unwrap();
    (output, gradients.iter().map(|(name, t)| (name.clone(), floats(t))).collect())
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1e-2f32, |m, x| m.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= tolerance * size, "{what}[{i}]: {a} for {b}");
    }
}

fn same(name: &str, decoder: &Decoder, board: &Board, tolerance: f32) {
    let (want, want_gradients) = step(decoder);
    let on_gpu = board.on(decoder);
    let (got, gradients) = step(&on_gpu);
    close(&format!("{name}: output"), &got, &want, tolerance);
    assert_eq!(gradients.keys().collect::<Vec<_>>(), want_gradients.keys().collect::<Vec<_>>());
    for (parameter, want) in &want_gradients {
        close(&format!("{name}: {parameter}"), &gradients[parameter], want, tolerance);
    }
    let again = step(&on_gpu.with_gradient_checkpointing(true));
    assert_eq!(again.0, got, "{name}: the same bits twice");
}

#[test]
fn passes_over_families_of_sequences_are_those_of_the_cpu() {
    let Some(board) = board() else { return };
    let more = serde_json::json!({"attention_bias": true});
    same("llama", &model("llama", 6, more), &board, 2e-4);
    let windowed = serde_json::json!({"sliding_window": 40, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "layer_types": ["sliding_attention", "full_attention"]});
    same("gemma2", &model("gemma2", 16, windowed), &board, 2e-4);
    same("qwen3", &model("qwen3", 18, serde_json::json!({})), &board, 2e-4);
}

#[test]
fn tensor_cores_by_shuffles_give_the_same() {
    if super::emulator::compiler().is_none() {
        return;
    }
    let board = Board { backend: Arc::new(Emulator::new(true)), device: Device::Cpu };
    same("llama", &model("llama", 6, serde_json::json!({})), &board, 2e-4);
}

#[test]
fn the_order_in_which_threads_run_changes_no_bit() {
    if super::emulator::compiler().is_none() {
        return;
    }
    let decoder = model("llama", 16, serde_json::json!({})).with_precision(Precision::Bf16);
    let sampling = Sampling { temperature: 0.9, top_k: 9, top_p: 0.8, ..Default::default() };
    let all = |order| {
        let backend = Arc::new(Emulator::shared().ordered(order));
        let decoder = Board { backend, device: Device::Cpu }.on(&decoder);
        let completions = generate(&decoder, sampling, 4, 0).into_iter();
        (step(&decoder), completions.map(|c| (c.tokens, c.logprobs)).collect::<Vec<_>>())
    };
    let wanted = all(0);
    for order in [1, 2, 3] {
        assert!(all(order) == wanted, "order {order}");
    }
}

#[test]
fn bfloat16_passes_stay_near_those_of_the_cpu() {
    let Some(board) = board() else { return };
    let decoder = model("llama", 16, serde_json::json!({}));
    let (want, want_gradients) = step(&decoder);
    let half = decoder.with_precision(Precision::Bf16);
    let (on_cpu, cpu_gradients) = step(&half);
    let (got, gradients) = step(&board.on(&half));
    // As far from f32 as the CPU's bfloat16 is, or at most twice as far: more of what lies between products is rounded.
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    assert!(distance(&got, &want) < 2.0 * distance(&on_cpu, &want));
    for (parameter, want) in &want_gradients {
        let (ours, theirs) = (distance(&gradients[parameter], want), distance(&cpu_gradients[parameter], want));
        assert!(ours < 2.0 * theirs + 1e-5, "{parameter}: {ours} against {theirs}");
    }
}

fn generate(decoder: &Decoder, sampling: Sampling, batch: usize, min_new_tokens: usize) -> Vec<Completion> {
    // One prompt is longer than what a block of decode attention takes.
    let long: Vec<u32> = (0..140).map(|i| (i * 7 + 3) % 61).collect();
    let prompts = [long[..70].to_vec(), long, vec![8, 9], vec![7]].map(Arc::new);
    let requests: Vec<Request> =
        (0..9).map(|i| Request { id: 40 + i, prompt: prompts[i as usize % 4].clone() }).collect();
    let options =
        Options { sampling, max_new_tokens: 37, min_new_tokens, eos: vec![2, 17], stop: vec![], seed: 5, batch };
    let mut all = Vec::new();
    Generator::new(decoder).unwrap().generate(requests, &options, None, &|| false, &mut |c| all.push(c)).unwrap();
    all.sort_by_key(|c| c.id);
    all
}

#[test]
fn completions_are_those_of_the_cpu_whatever_the_filters_and_the_batch() {
    let Some(board) = board() else { return };
    let decoder = model("llama", 6, serde_json::json!({}));
    let on_gpu = board.on(&decoder);
    let plain = Sampling { temperature: 0.8, ..Default::default() };
    for (sampling, batch, min) in [
        (plain, 4, 0),
        (Sampling { temperature: 0.0, ..plain }, 3, 0),
        (Sampling { top_k: 7, ..plain }, 9, 5),
        (Sampling { top_p: 0.7, ..plain }, 9, 0),
        (Sampling { min_p: 0.2, top_k: 20, top_p: 0.9, ..plain }, 2, 20),
    ] {
        let (want, got) = (generate(&decoder, sampling, 4, min), generate(&on_gpu, sampling, batch, min));
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert_eq!((got.id, &got.tokens, got.finish), (want.id, &want.tokens, want.finish), "{sampling:?}");
            close("log-probabilities", &got.logprobs, &want.logprobs, 1e-4);
        }
    }
    let sandwich = serde_json::json!({"sliding_window": 9, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "layer_types": ["sliding_attention", "full_attention"]});
    let gemma = model("gemma2", 16, sandwich);
    let (want, got) = (generate(&gemma, plain, 4, 0), generate(&board.on(&gemma), plain, 9, 0));
    assert_eq!(got.iter().map(|c| &c.tokens).collect::<Vec<_>>(), want.iter().map(|c| &c.tokens).collect::<Vec<_>>());
    // More queries share a key head than are computed together.
    let grouped = model("llama", 8, serde_json::json!({"num_attention_heads": 12}));
    let (want, got) = (generate(&grouped, plain, 4, 0), generate(&board.on(&grouped), plain, 9, 0));
    assert_eq!(got.iter().map(|c| &c.tokens).collect::<Vec<_>>(), want.iter().map(|c| &c.tokens).collect::<Vec<_>>());
}

#[test]
fn what_a_gpu_cannot_do_is_refused_in_words() {
    let Some(board) = board() else { return };
    let decoder = board.on(&model("llama", 6, serde_json::json!({})));
    let request = Request { id: 1, prompt: Arc::new(vec![3]) };
    let options = Options {
        sampling: Sampling::default(),
        max_new_tokens: 3,
        min_new_tokens: 0,
        eos: (0..17).collect(),
        stop: vec![],
        seed: 5,
        batch: 1,
    };
    let mut generator = Generator::new(&decoder).unwrap();
    let error = generator.generate(vec![request], &options, None, &|| false, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("17 end-of-sequence tokens"), "{error}");
}

#[test]
fn a_step_of_adamw_is_the_cpus() {
    let Some(board) = board() else { return };
    let n = 1000usize;
    let noise = |id: u64| (0..n as u64).map(|i| Stream::new(4, id).normal(i) as f32).collect::<Vec<_>>();
    for moments in [MomentType::Full, MomentType::Bf16, MomentType::Int8] {
        let variables = |values: Vec<f32>, on: &Device| BTreeMap::from([("w".into(), Var::new(values, on).unwrap())]);
        let config = AdamWConfig { moments, weight_decay: 0.01, ..Default::default() };
        let on_cpu = variables(noise(1), &Device::Cpu);
        let mut optimizer = AdamW::new(&on_cpu, config).unwrap();
        for step in 1..=5u64 {
            // Each GPU step starts from the CPU's state, so that a moment that is rounded differently is not carried on.
            let on_gpu = variables(floats(&on_cpu["w"].as_detached_tensor()), &board.device);
            let mut gpu = AdamW::new(&on_gpu, config).unwrap().with_gpu_backend(board.backend.clone());
            gpu.restore(optimizer.steps(), &optimizer.state()).unwrap();
            let gradient = Tensor::new(noise(10 + step), &Device::Cpu).unwrap();
            let moved = BTreeMap::from([("w".to_string(), gradient.to_device(&board.device).unwrap())]);
            let gradients = BTreeMap::from([("w".to_string(), gradient)]);
            gpu.step(&on_gpu, &moved, 1e-2, 0.5).unwrap();
            optimizer.step(&on_cpu, &gradients, 1e-2, 0.5).unwrap();
            let [got, want] = [&on_gpu, &on_cpu].map(|variables| floats(&variables["w"].as_detached_tensor()));
            assert_ne!(got, floats(&Tensor::new(noise(1), &Device::Cpu).unwrap()), "nothing was updated");
            close(&format!("{moments:?} moments, step {step}"), &got, &want, 1e-5);
        }
    }
}

#[test]
fn the_norm_of_gradients_is_the_cpus() {
    let Some(board) = board() else { return };
    let tensors = [(1usize, 3usize), (2, 70_000), (3, 65_536)].map(|(id, n)| {
        let values: Vec<f32> = (0..n as u64).map(|i| Stream::new(4, id as u64).normal(i) as f32).collect();
        (format!("t{id}"), Tensor::new(values, &Device::Cpu).unwrap())
    });
    let on_cpu = BTreeMap::from(tensors);
    let on_gpu =
        on_cpu.iter().map(|(name, t)| (name.clone(), t.to_device(&board.device).unwrap())).collect::<BTreeMap<_, _>>();
    let (want, got) = (global_norm(&on_cpu).unwrap(), global_norm_on(&*board.backend, &on_gpu).unwrap());
    assert!((want - got).abs() < 1e-12 * want, "{got} for {want}");
}
