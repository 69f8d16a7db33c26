//! Supervised fine-tuning: the negative log-likelihood of demonstrations.

use candle_core::Tensor;

use crate::token::span_sums;
use crate::{Error, Result, Whole};

/// How token losses become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NllReduction {
    /// `-Σ log p / tokens` over the whole batch: long answers weigh more (TRL, Hugging Face).
    #[default]
    TokenMean,
    /// Mean over sequences of the mean over their tokens: every answer weighs the same.
    SequenceMean,
    /// Mean over sequences of the sum over their tokens: the likelihood of whole answers (SLiC's regulariser).
    SequenceSum,
}

/// A micro-batch's share of the negative log-likelihood of a batch.
///
/// `logprobs` is `[tokens]`, sequence `s` at `spans[s]..spans[s + 1]`. Shares of all micro-batches add up to the loss
/// of the batch: they are divided by what the whole of it holds, not by their own sizes.
pub fn nll(logprobs: &Tensor, spans: &[usize], reduction: NllReduction, whole: Whole) -> Result<Tensor> {
    if whole.tokens == 0 || whole.sequences == 0 {
        return Err(Error::Length { what: "tokens to learn from", found: 0, wanted: 1 });
    }
    let negative = logprobs.neg()?;
    Ok(match reduction {
        NllReduction::TokenMean => (negative.sum_all()? / whole.tokens as f64)?,
        NllReduction::SequenceSum => (negative.sum_all()? / whole.sequences as f64)?,
        NllReduction::SequenceMean => {
            let lengths: Vec<f64> = spans.windows(2).map(|w| (w[1] - w[0]).max(1) as f64).collect();
            let lengths = Tensor::new(lengths, logprobs.device())?.to_dtype(logprobs.dtype())?;
            (span_sums(&negative, spans)?.div(&lengths)?.sum_all()? / whole.sequences as f64)?
        }
    })
}
