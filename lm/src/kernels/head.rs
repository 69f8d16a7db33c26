//! Linear + log-softmax + gather, in chunks of rows: the `[tokens, vocabulary]` logits never exist at once.

use rayon::prelude::*;

use super::gemm::{Packed, View, gemm};
use super::isa::per_isa;
use super::math::{exp, log_sum_exp};

/// Floats of logits that exist at a time (64 MiB).
const LOGITS_MAX: usize = 16 << 20;

fn rows_per_chunk(vocab: usize) -> usize {
    (LOGITS_MAX / vocab.max(1)).clamp(16, 512)
}

/// Log-probabilities of `targets` under `softmax(hidden · weightᵀ / temperature)`, and the log-sum-exp of each row.
///
/// `hidden` is `[targets.len(), width]`; `weight` is the packed transpose of a `[vocabulary, width]` matrix.
pub fn logprobs(hidden: &[f32], weight: &Packed, targets: &[u32], temperature: f32) -> (Vec<f32>, Vec<f32>) {
    let (width, vocab) = (weight.depth(), weight.cols());
    let rows = rows_per_chunk(vocab);
    let (mut out, mut lse) = (vec![0.0; targets.len()], vec![0.0; targets.len()]);
    let mut logits = vec![0.0; rows.min(targets.len()) * vocab];
    for (chunk, targets) in targets.chunks(rows).enumerate() {
        let at = chunk * rows;
        let logits = &mut logits[..targets.len() * vocab];
        gemm(View::new(&hidden[at * width..(at + targets.len()) * width], targets.len(), width), weight, logits, false);
        out[at..].par_iter_mut().zip(lse[at..].par_iter_mut()).zip(logits.par_chunks(vocab).zip(targets)).for_each(
            |((out, lse), (row, &target))| {
                *lse = log_sum_exp(row, 1.0 / temperature);
                *out = logprob(row, target, temperature, *lse);
            },
        );
    }
    (out, lse)
}

/// Log-probability of a token, given its row's log-sum-exp at the same temperature.
pub fn logprob(logits: &[f32], token: u32, temperature: f32, lse: f32) -> f32 {
    logits[token as usize] * (1.0 / temperature) - lse
}

/// Gradients with respect to `hidden` and `weight` (`[vocabulary, width]`), given `grad` for each row.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    hidden: &[f32],
    weight: View<'_>,
    targets: &[u32],
    temperature: f32,
    lse: &[f32],
    grad: &[f32],
    width: usize,
    wants_weight: bool,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let (forward, down) = (Packed::new(weight.t()), Packed::new(weight));
    let vocab = forward.cols();
    let rows = rows_per_chunk(vocab);
    let mut d_hidden = vec![0.0; hidden.len()];
    let mut d_weight = wants_weight.then(|| vec![0.0; vocab * width]);
    let mut logits = vec![0.0; rows.min(targets.len()) * vocab];
    for (chunk, targets) in targets.chunks(rows).enumerate() {
        let (at, n) = (chunk * rows, targets.len());
        let logits = &mut logits[..n * vocab];
        let hidden = View::new(&hidden[at * width..(at + n) * width], n, width);
        gemm(hidden, &forward, logits, false);
        logits.par_chunks_mut(vocab).enumerate().for_each(|(i, row)| {
            softmax_backward(row, targets[i], 1.0 / temperature, lse[at + i], grad[at + i]);
        });
        let d_logits = View::new(logits, n, vocab);
        gemm(d_logits, &down, &mut d_hidden[at * width..(at + n) * width], false);
        if let Some(d_weight) = &mut d_weight {
            gemm(d_logits.t(), &Packed::new(hidden), d_weight, true);
        }
    }
    (d_hidden, d_weight)
}

per_isa! {
    /// Turns logits into the gradient of `grad * logprob(target)`.
    fn softmax_backward(row: &mut [f32], target: u32, scale: f32, lse: f32, grad: f32) {
        for x in row.iter_mut() {
            *x = -grad * scale * exp(x.mul_add(scale, -lse));
        }
        row[target as usize] += grad * scale;
    }
}
