//! Supervised fine-tuning: the negative log-likelihood of demonstrations.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::token::span_sums;
use crate::{BatchTotals, Error, Result};

/// Reduction of token losses to one loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum NllReduction {
    /// `-Σ log p / tokens` over the whole batch: long completions weigh more (TRL, Hugging Face).
    #[default]
    TokenMean,
    /// Mean over sequences of the mean over their tokens: every completion weighs the same.
    SequenceMean,
    /// Mean over sequences of the sum over their tokens: the likelihood of whole completions (SLiC's regulariser).
    SequenceSum,
}

/// A micro-batch's share of the negative log-likelihood of a batch.
///
/// `logprobs` is `[tokens]`, with sequence `s` at `spans[s]..spans[s + 1]`. Shares are divided by the totals of the
/// batch, not of the micro-batch, so that they add up to the loss of the batch. Fails if the batch has no tokens.
pub fn nll(logprobs: &Tensor, spans: &[usize], reduction: NllReduction, totals: BatchTotals) -> Result<Tensor> {
    if totals.tokens == 0 || totals.sequences == 0 {
        return Err(Error::Length { what: "tokens in the loss", found: 0, wanted: 1 });
    }
    let negative = logprobs.neg()?;
    Ok(match reduction {
        NllReduction::TokenMean => (negative.sum_all()? / totals.tokens as f64)?,
        NllReduction::SequenceSum => (negative.sum_all()? / totals.sequences as f64)?,
        NllReduction::SequenceMean => {
            let lengths: Vec<f64> = spans.windows(2).map(|w| (w[1] - w[0]).max(1) as f64).collect();
            let lengths = Tensor::new(lengths, logprobs.device())?.to_dtype(logprobs.dtype())?;
            (span_sums(&negative, spans)?.div(&lengths)?.sum_all()? / totals.sequences as f64)?
        }
    })
}
