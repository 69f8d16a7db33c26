//! Values and gradients equal those of the candle graph, and do not depend on the other sequences of a batch.

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use rehearsal_kernels::gemm::Precision;

use crate::model::{Batch, Decoder, Gradients, Sequence};
use crate::ops::Kernels;
use crate::testing;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

fn decoder(precision: Precision) -> Decoder {
    testing::checkpoint().trainable(&Device::Cpu, DType::F32).unwrap().with_precision(precision)
}

/// Three prompts, the first with three completions, the last without a prompt.
fn sequences() -> Vec<(Vec<u32>, Vec<u32>)> {
    let long: Vec<u32> = (0..60).map(|i| i * 7 % 27).collect();
    vec![
        (long.clone(), vec![1, 2, 3, 29]),
        (long.clone(), vec![4]),
        (long, (0..20).collect()),
        (vec![28, 5], vec![6, 7, 29]),
        (vec![28, 5], vec![]),
        (vec![], vec![8, 9, 10]),
    ]
}

fn batch(sequences: &[(Vec<u32>, Vec<u32>)]) -> Batch {
    Batch::new(sequences.iter().map(|(prompt, completion)| Sequence { prompt, completion }))
}

type Named = BTreeMap<String, Vec<f32>>;

fn step(decoder: &Decoder, batch: &Batch) -> (Vec<f32>, Named) {
    let forward = decoder.forward(batch, 0.9).unwrap();
    let logprobs: Vec<f32> = forward.output().to_vec1().unwrap();
    let mut gradients = Gradients::default();
    forward.backward(&(forward_weights(logprobs.len())), &mut gradients).unwrap();
    let flat = |t: candle_core::Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
    (logprobs, gradients.complete(decoder).unwrap().into_iter().map(|(name, t)| (name, flat(t))).collect())
}

fn forward_weights(n: usize) -> candle_core::Tensor {
    let weights: Vec<f32> = (0..n).map(|i| (i % 5) as f32 - 1.7).collect();
    candle_core::Tensor::new(weights, &Device::Cpu).unwrap()
}

fn close(got: &Named, want: &Named, tolerance: f32) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    for (name, want) in want {
        let size = want.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        for (i, (a, b)) in got[name].iter().zip(want).enumerate() {
            assert!((a - b).abs() <= tolerance * size, "{name}[{i}]: {a} against {b}");
        }
    }
}

#[test]
fn values_and_gradients_are_those_of_the_graph() {
    let batch = batch(&sequences());
    let (want, want_gradients) = step(&decoder(Precision::F32).with_kernels(Kernels::Plain), &batch);
    let (got, gradients) = step(&decoder(Precision::F32), &batch);
    for (a, b) in got.iter().zip(&want) {
        assert!((a - b).abs() < 1e-4, "{a} against {b}");
    }
    close(&gradients, &want_gradients, 1e-4);
}

#[test]
fn bfloat16_products_stay_near_f32() {
    let batch = batch(&sequences());
    let (want, want_gradients) = step(&decoder(Precision::F32), &batch);
    let (got, gradients) = step(&decoder(Precision::Bf16), &batch);
    for (a, b) in got.iter().zip(&want) {
        assert!((a - b).abs() < 0.1, "{a} against {b}");
    }
    close(&gradients, &want_gradients, 0.1);
    assert_ne!(got, want, "the inputs of products were not rounded");
}

#[test]
fn a_shared_prompt_changes_no_log_probability_and_gradients_only_by_rounding() {
    for precision in PRECISIONS {
        let (decoder, sequences) = (decoder(precision), sequences());
        let together = batch(&sequences);
        let (want, want_gradients) = step(&decoder, &together);
        let mut got = Vec::new();
        let mut sums = Named::new();
        let mut seen = 0;
        for one in &sequences {
            let alone = batch(std::slice::from_ref(one));
            let logprobs: Vec<f32> = decoder.logprobs(&alone, 0.9).unwrap().to_vec1().unwrap();
            if alone.scored() > 0 {
                let forward = decoder.forward(&alone, 0.9).unwrap();
                let mut gradients = Gradients::default();
                let weights = forward_weights(want.len()).narrow(0, seen, alone.scored()).unwrap();
                forward.backward(&weights, &mut gradients).unwrap();
                for (name, t) in gradients.complete(&decoder).unwrap() {
                    let flat: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
                    let sum = sums.entry(name).or_insert_with(|| vec![0.0; flat.len()]);
                    sum.iter_mut().zip(flat).for_each(|(s, x)| *s += x);
                }
            }
            seen += alone.scored();
            got.extend(logprobs);
        }
        assert_eq!(got, want, "{precision:?}");
        close(&sums, &want_gradients, if precision == Precision::F32 { 1e-5 } else { 2e-2 });
        assert!(together.tokens() < sequences.iter().map(|(p, c)| p.len() + c.len()).sum::<usize>() - 100);
    }
}

#[test]
fn threads_and_checkpointing_change_no_bit() {
    for precision in PRECISIONS {
        let batch = batch(&sequences());
        let want = step(&decoder(precision), &batch);
        assert_eq!(step(&decoder(precision).with_gradient_checkpointing(true), &batch), want, "{precision:?}");
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| step(&decoder(precision), &batch)), want, "{precision:?}, {threads} threads");
        }
    }
}

#[test]
fn a_frozen_model_in_bfloat16_equals_the_trained_one() {
    let rounded = testing::checkpoint().rounded(DType::BF16).unwrap();
    let batch = batch(&sequences());
    let frozen = rounded.frozen(&Device::Cpu, DType::BF16).unwrap();
    let trained = rounded.trainable(&Device::Cpu, DType::F32).unwrap().with_precision(Precision::Bf16);
    let logprobs = |d: &Decoder| d.logprobs(&batch, 1.0).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(logprobs(&frozen), logprobs(&trained));
}
