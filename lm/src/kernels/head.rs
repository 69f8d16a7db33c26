//! Linear + log-softmax + gather, in chunks of rows: the `[tokens, vocabulary]` logits never exist at once.

use rayon::prelude::*;

use super::gemm::{Element, Packed, Precision, View, gemm};
use super::isa::per_isa;
use super::math::{exp, log_sum_exp};

/// Floats of logits that exist at a time (64 MiB).
const LOGITS_MAX: usize = 16 << 20;

fn rows_per_chunk(vocab: usize) -> usize {
    (LOGITS_MAX / vocab.max(1)).clamp(16, 512)
}

/// Which token each row is asked about, and at what temperature.
#[derive(Clone, Copy)]
pub struct Targets<'a> {
    pub tokens: &'a [u32],
    pub temperature: f32,
}

/// Log-probabilities of the targets under `softmax(hidden · weightᵀ / temperature)`, and the log-sum-exp of each row.
///
/// `hidden` is `[targets, width]`; `weight` is the packed transpose of a `[vocabulary, width]` matrix.
pub fn logprobs(hidden: &[f32], weight: &Packed, targets: Targets<'_>) -> (Vec<f32>, Vec<f32>) {
    let (width, vocab) = (weight.depth(), weight.cols());
    let (rows, scale) = (rows_per_chunk(vocab), 1.0 / targets.temperature);
    let (mut out, mut lse) = (vec![0.0; targets.tokens.len()], vec![0.0; targets.tokens.len()]);
    let mut logits = vec![0.0; rows.min(targets.tokens.len()) * vocab];
    for (chunk, tokens) in targets.tokens.chunks(rows).enumerate() {
        let at = chunk * rows;
        let logits = &mut logits[..tokens.len() * vocab];
        gemm(View::new(&hidden[at * width..(at + tokens.len()) * width], tokens.len(), width), weight, logits, false);
        out[at..].par_iter_mut().zip(lse[at..].par_iter_mut()).zip(logits.par_chunks(vocab).zip(tokens)).for_each(
            |((out, lse), (row, &target))| {
                *lse = log_sum_exp(row, scale);
                *out = logprob(row, target, targets.temperature, *lse);
            },
        );
    }
    (out, lse)
}

/// Log-probability of a token, given its row's log-sum-exp at the same temperature.
pub fn logprob(logits: &[f32], token: u32, temperature: f32, lse: f32) -> f32 {
    logits[token as usize] * (1.0 / temperature) - lse
}

/// The gradient with respect to `hidden`, given `grad` for each log-probability; the gradient with respect to the
/// `weight` `[vocabulary, width]` is added to `d_weight`.
pub fn backward<E: Element>(
    hidden: &[f32],
    weight: View<'_, E>,
    targets: Targets<'_>,
    lse: &[f32],
    grad: &[f32],
    d_weight: Option<&mut [f32]>,
    precision: Precision,
) -> Vec<f32> {
    let (vocab, width) = weight.shape();
    let (forward, down) = (Packed::new(weight.t(), precision), Packed::new(weight, precision));
    let (rows, scale) = (rows_per_chunk(vocab), 1.0 / targets.temperature);
    let mut d_hidden = vec![0.0; hidden.len()];
    let mut d_weight = d_weight;
    let mut logits = vec![0.0; rows.min(targets.tokens.len()) * vocab];
    let mut packed = Packed::empty(precision);
    for (chunk, tokens) in targets.tokens.chunks(rows).enumerate() {
        let (at, n) = (chunk * rows, tokens.len());
        let logits = &mut logits[..n * vocab];
        let hidden = View::new(&hidden[at * width..(at + n) * width], n, width);
        gemm(hidden, &forward, logits, false);
        logits.par_chunks_mut(vocab).enumerate().for_each(|(i, row)| {
            softmax_backward(row, tokens[i], scale, lse[at + i], grad[at + i]);
        });
        let d_logits = View::new(&*logits, n, vocab);
        gemm(d_logits, &down, &mut d_hidden[at * width..(at + n) * width], false);
        if let Some(d_weight) = d_weight.as_deref_mut() {
            packed.fill(&[hidden], true);
            gemm(d_logits.t(), &packed, d_weight, true);
        }
    }
    d_hidden
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
