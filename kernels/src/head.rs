//! Fused linear layer, log-softmax and gather, in blocks of the vocabulary: neither the `[tokens, vocabulary]` logits nor a
//! packed copy of the weights ever exist as a whole.

use crate::gemm::{Element, Packed, Precision, View, gemm};
use crate::isa::per_isa;
use crate::math::{LANES, LSE_BLOCK, LogSum, LogSumExp, exp, softcap, sum};
use crate::team::{chunk, for_each_chunk};

/// Rows per block of logits: with [`LSE_BLOCK`] columns, 32 MiB.
const ROWS: usize = 2048;

/// The token whose log-probability is computed for each row, and the sampling temperature.
#[derive(Clone, Copy)]
pub struct Targets<'a> {
    /// One token for each row.
    pub tokens: &'a [u32],
    /// Sampling temperature that logits are divided by; above 0.
    pub temperature: f32,
    /// Logits are softcapped to `cap * tanh(logit / cap)` before the temperature is applied.
    pub softcap: Option<f32>,
}

impl Targets<'_> {
    fn scale(&self) -> f32 {
        1.0 / self.temperature
    }
}

/// Log-probability of a token, given the log-sum-exp of its row's logits at the same temperature.
pub fn logprob(logits: &[f32], token: u32, temperature: f32, lse: LogSum) -> f32 {
    logits[token as usize] * (1.0 / temperature) - lse.high - lse.low
}

/// Calls `f(rows, columns, logits)` for each block of rows and vocabulary columns.
fn blocks<E: Element>(
    hidden: &[f32],
    weight: View<'_, E>,
    cap: Option<f32>,
    precision: Precision,
    mut f: impl FnMut(std::ops::Range<usize>, std::ops::Range<usize>, &mut [f32]),
) {
    let (vocab, width) = weight.shape();
    let rows = hidden.len() / width;
    let hidden = View::new(hidden, rows, width);
    let mut packed = Packed::empty(precision);
    let mut logits = vec![0.0; rows.min(ROWS) * vocab.min(LSE_BLOCK)];
    for row in (0..rows).step_by(ROWS) {
        let row = row..(row + ROWS).min(rows);
        for column in (0..vocab).step_by(LSE_BLOCK) {
            let column = column..(column + LSE_BLOCK).min(vocab);
            packed.fill(&[weight.rows(column.clone()).t()], true);
            let logits = &mut logits[..row.len() * column.len()];
            gemm(hidden.rows(row.clone()), &packed, logits, false);
            if let Some(cap) = cap {
                for_each_chunk(logits, column.len(), |_, logits| softcap(logits, cap));
            }
            f(row.clone(), column, logits);
        }
    }
}

/// Log-probabilities of the targets under `softmax(hidden · weightᵀ / temperature)`, and the log-sum-exp of each row.
///
/// `hidden` is `[targets, width]`, `weight` `[vocabulary, width]`.
pub fn logprobs<E: Element>(
    hidden: &[f32],
    weight: View<'_, E>,
    targets: Targets<'_>,
    precision: Precision,
) -> (Vec<f32>, Vec<LogSum>) {
    let scale = targets.scale();
    let mut sums = vec![(LogSumExp::default(), 0.0); targets.tokens.len()];
    blocks(hidden, weight, targets.softcap, precision, |rows, columns, logits| {
        for_each_chunk(&mut sums[rows.clone()], 1, |i, sums| {
            let (logits, token) = (chunk(logits, columns.len(), i), targets.tokens[rows.start + i] as usize);
            for (sum, chosen) in sums {
                sum.add(logits, scale);
                if columns.contains(&token) {
                    *chosen = logits[token - columns.start];
                }
            }
        });
    });
    let answer = |(sum, chosen): &(LogSumExp, f32)| {
        let lse = sum.value();
        (chosen * scale - lse.high - lse.low, lse)
    };
    sums.iter().map(answer).unzip()
}

/// Entropies `-Σ p log p` of the rows, given their log-sum-exps; computes the logits a second time.
pub fn entropies<E: Element>(
    hidden: &[f32],
    weight: View<'_, E>,
    lse: &[LogSum],
    targets: Targets<'_>,
    precision: Precision,
) -> Vec<f32> {
    let mut sums = vec![0.0; lse.len()];
    blocks(hidden, weight, targets.softcap, precision, |rows, columns, logits| {
        for_each_chunk(&mut sums[rows.clone()], 1, |i, sum| {
            sum[0] += entropy_part(chunk(logits, columns.len(), i), targets.scale(), lse[rows.start + i]);
        });
    });
    sums
}

per_isa! {
    fn entropy_part(logits: &[f32], scale: f32, lse: LogSum) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = logits.as_chunks::<LANES>();
        for x in whole {
            for i in 0..LANES {
                let log = x[i].mul_add(scale, -lse.high) - lse.low;
                lanes[i] = exp(log).mul_add(-log, lanes[i]);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            let log = x.mul_add(scale, -lse.high) - lse.low;
            *lane = exp(log).mul_add(-log, *lane);
        }
        sum(&lanes)
    }
}

/// Inputs of [`backward`].
pub struct Saved<'a> {
    /// Hidden states of the forward pass, `[rows, hidden]`.
    pub hidden: &'a [f32],
    /// Log-sum-exp of each row's logits, as the forward pass wrote it.
    pub lse: &'a [LogSum],
    /// Gradient of each log-probability.
    pub grad: &'a [f32],
    /// Entropies and their gradients, if entropies were computed.
    pub entropy: Option<(&'a [f32], &'a [f32])>,
}

/// Backward pass of [`logprobs`] and [`entropies`]: returns the gradient of `hidden`, and adds the gradient of `weight`,
/// `[vocabulary, width]`, to `d_weight`.
pub fn backward<E: Element>(
    saved: &Saved<'_>,
    weight: View<'_, E>,
    targets: Targets<'_>,
    d_weight: &mut [f32],
    precision: Precision,
) -> Vec<f32> {
    let width = weight.shape().1;
    let scale = targets.scale();
    let mut d_hidden = vec![0.0; saved.hidden.len()];
    let (mut down, mut input) = (Packed::empty(precision), Packed::empty(precision));
    blocks(saved.hidden, weight, targets.softcap, precision, |rows, columns, logits| {
        for_each_chunk(logits, columns.len(), |i, logits| {
            let row = rows.start + i;
            let target = (targets.tokens[row] as usize).checked_sub(columns.start);
            let (entropy, d_entropy) = saved.entropy.map_or((0.0, 0.0), |(h, grad)| (h[row], grad[row]));
            let row =
                Row { scale, lse: saved.lse[row], grad: saved.grad[row], entropy, d_entropy, cap: targets.softcap };
            softmax_backward(logits, target, row);
        });
        let d_logits = View::new(&*logits, rows.len(), columns.len());
        let elements = rows.start * width..rows.end * width;
        down.fill(&[weight.rows(columns.clone())], true);
        gemm(d_logits, &down, &mut d_hidden[elements.clone()], columns.start > 0);
        if columns.start == 0 {
            input.fill(&[View::new(&saved.hidden[elements], rows.len(), width)], true);
        }
        gemm(d_logits.t(), &input, &mut d_weight[columns.start * width..columns.end * width], true);
    });
    d_hidden
}

/// What the backward pass knows of a row.
#[derive(Clone, Copy)]
struct Row {
    scale: f32,
    lse: LogSum,
    grad: f32,
    entropy: f32,
    d_entropy: f32,
    cap: Option<f32>,
}

impl Row {
    /// Derivative of the softcap, given the softcapped logit.
    #[inline(always)]
    fn slope(&self, softcapped: f32) -> f32 {
        self.cap.map_or(1.0, |cap| 1.0 - (softcapped / cap) * (softcapped / cap))
    }
}

per_isa! {
    /// Replaces a block of a row's logits by the gradient of `grad * logprob(target) + d_entropy * entropy`.
    fn softmax_backward(logits: &mut [f32], target: Option<usize>, row: Row) {
        let chosen = target.and_then(|t| logits.get(t).copied());
        for x in logits.iter_mut() {
            let log = x.mul_add(row.scale, -row.lse.high) - row.lse.low;
            let d = -row.scale * exp(log) * (log + row.entropy).mul_add(row.d_entropy, row.grad);
            *x = d * row.slope(*x);
        }
        if let (Some(softcapped), Some(x)) = (chosen, target.and_then(|t| logits.get_mut(t))) {
            *x += row.grad * row.scale * row.slope(softcapped);
        }
    }
}
