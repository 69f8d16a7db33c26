//! The language-model head: log-probabilities of tokens and entropies, by the fused kernel and by the graph that runs
//! where there is no kernel.

use candle_core::{DType, Tensor, Var};
use rehearsal_kernels::gemm::{Precision, View};
use rehearsal_kernels::head::{self, Saved, Targets};
use rehearsal_lm::ops;

use super::{Golden, TYPES, flat};

/// Logits `[rows, vocabulary]` of a file, whatever its other axes are.
fn logits(golden: &Golden, dtype: DType) -> Tensor {
    let logits = golden.input("logits", dtype);
    let vocabulary = *logits.dims().last().unwrap();
    logits.reshape(((), vocabulary)).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    flat(tensor).iter().map(|&x| x as f32).collect()
}

/// Compares what the kernel found, at the f32 tolerance of the file.
fn check_kernel(golden: &Golden, key: &str, got: &[f32]) {
    golden.check_numbers(key, &got.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), true);
}

/// The kernel on hidden states that are the logits, times the identity: its gradient for them is that for the logits.
struct Kernel {
    logprobs: Vec<f32>,
    entropies: Vec<f32>,
    gradient: Vec<f32>,
}

/// `grad` and `d_entropy` are the gradients of the log-probabilities and of the entropies.
fn kernel(logits: &Tensor, tokens: &[u32], temperature: f64, grad: &[f32], d_entropy: Option<&[f32]>) -> Kernel {
    let vocabulary = logits.dims()[1];
    let identity: Vec<f32> =
        (0..vocabulary * vocabulary).map(|i| f32::from(u8::from(i % (vocabulary + 1) == 0))).collect();
    let weight = View::new(&identity, vocabulary, vocabulary);
    let hidden = floats(logits);
    let targets = Targets { tokens, temperature: temperature as f32, softcap: None };
    let (logprobs, lse) = head::logprobs(&hidden, weight, targets, Precision::F32);
    let entropies = head::entropies(&hidden, weight, &lse, targets, Precision::F32);
    let entropy = d_entropy.map(|d| (entropies.as_slice(), d));
    let saved = Saved { hidden: &hidden, lse: &lse, grad, entropy };
    let gradient = head::backward(&saved, weight, targets, &mut vec![0.0; identity.len()], Precision::F32);
    Kernel { logprobs, entropies, gradient }
}

#[test]
fn golden_logprobs() {
    for name in ["logprobs", "logprobs_temperature", "logprobs_extreme"] {
        let golden = Golden::load(name);
        let temperature = golden.param("temperature");
        let tokens: Vec<u32> = golden.integers("labels").iter().map(|&label| label as u32).collect();
        for dtype in TYPES {
            // f32 cannot hold the extreme inputs' differences; the file's f32 tolerance allows for it.
            let logits = Var::from_tensor(&logits(&golden, dtype)).unwrap();
            let logprobs = ops::logprobs(&logits, &tokens, temperature, false).unwrap();
            golden.check("logprobs", &logprobs);
            let grad = golden.input("grad_out", dtype).flatten_all().unwrap();
            let loss = (logprobs * grad).unwrap().sum_all().unwrap();
            golden.check("grad_logits", loss.backward().unwrap().get(&logits).unwrap());
        }
        let grad = floats(&golden.input("grad_out", DType::F64));
        let got = kernel(&logits(&golden, DType::F64), &tokens, temperature, &grad, None);
        check_kernel(&golden, "logprobs", &got.logprobs);
        check_kernel(&golden, "grad_logits", &got.gradient);
    }
}

#[test]
fn golden_entropy() {
    let golden = Golden::load("entropy");
    let rows = logits(&golden, DType::F64).dims()[0];
    // Entropies come beside the log-probabilities of some tokens.
    let tokens = vec![0; rows];
    for dtype in TYPES {
        let logits = Var::from_tensor(&logits(&golden, dtype)).unwrap();
        let entropies = ops::logprobs(&logits, &tokens, 1.0, true).unwrap().narrow(0, rows, rows).unwrap();
        golden.check("entropy", &entropies);
        let grad = golden.input("grad_out", dtype).flatten_all().unwrap();
        let loss = (entropies * grad).unwrap().sum_all().unwrap();
        golden.check("grad_logits", loss.backward().unwrap().get(&logits).unwrap());
    }
    let grad = floats(&golden.input("grad_out", DType::F64));
    let got = kernel(&logits(&golden, DType::F64), &tokens, 1.0, &vec![0.0; rows], Some(&grad));
    check_kernel(&golden, "entropy", &got.entropies);
    check_kernel(&golden, "grad_logits", &got.gradient);
}
