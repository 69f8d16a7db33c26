//! Forward passes over many sequences without gradients, in micro-batches of at most `budget` tokens.

use candle_core::{DType, Tensor};
use rehearsal_lm::{Batch, Decoder, Sequence};

use crate::micro_batch::micro_batches;
use crate::{MaskedSequence, Result, Tokens};

/// Log-probabilities of each completion's tokens: one list per completion.
pub(crate) fn logprobs(decoder: &Decoder, tokens: &[Tokens], temperature: f64, budget: usize) -> Result<Vec<Vec<f32>>> {
    by_token(tokens, budget, |batch| decoder.logprobs(batch, temperature))
}

/// For each sequence, the sum of the log-probabilities of the tokens in its loss mask.
pub(crate) fn likelihoods(decoder: &Decoder, sequences: &[MaskedSequence], budget: usize) -> Result<Vec<f64>> {
    let mut all = Vec::with_capacity(sequences.len());
    for part in micro_batches(sequences, budget, |_, s| s.tokens.len()) {
        let batch = Batch::marked(part.iter().map(|s| (s.tokens.as_slice(), s.loss_mask.as_slice())));
        let flat = floats(&decoder.logprobs(&batch, 1.0)?)?;
        let sums = batch.spans().windows(2).map(|w| flat[w[0]..w[1]].iter().map(|&x| f64::from(x)).sum::<f64>());
        all.extend(sums);
    }
    Ok(all)
}

/// Values of each completion's tokens: one list per completion. A token's value is read at the token before it.
pub(crate) fn values(decoder: &Decoder, tokens: &[Tokens], budget: usize) -> Result<Vec<Vec<f32>>> {
    by_token(tokens, budget, |batch| decoder.values(batch))
}

/// Scores of whole sequences, read at the last token that is not padding.
pub(crate) fn scores(decoder: &Decoder, tokens: &[Tokens], budget: usize) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(tokens.len());
    for part in micro_batches(tokens, budget, added_tokens) {
        let batch = Batch::ends(part.iter().map(|t| scored(decoder, t)));
        all.extend(floats(&decoder.values(&batch)?)?);
    }
    Ok(all)
}

/// The sequence that a score is read at the last token of: without trailing padding (transformers' rule; where the
/// end-of-sequence token is also the padding token, the score is read before it).
pub(crate) fn scored<'a>(decoder: &Decoder, tokens: &'a Tokens) -> Sequence<'a> {
    let architecture = decoder.architecture();
    let completion = if tokens.prompt.is_empty() {
        architecture.scored_prefix(&tokens.completion)
    } else {
        architecture.without_padding(&tokens.completion)
    };
    Sequence { prompt: &tokens.prompt, completion }
}

fn by_token(
    tokens: &[Tokens],
    budget: usize,
    pass: impl Fn(&Batch) -> rehearsal_lm::Result<Tensor>,
) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(tokens.len());
    for part in micro_batches(tokens, budget, added_tokens) {
        let batch = Batch::new(part.iter().map(Tokens::sequence));
        let flat = floats(&pass(&batch)?)?;
        all.extend(batch.spans().windows(2).map(|w| flat[w[0]..w[1]].to_vec()));
    }
    Ok(all)
}

/// Tokens that a sequence adds to a micro-batch, in which neighbours share their prompt.
fn added_tokens(previous: Option<&Tokens>, tokens: &Tokens) -> usize {
    let shared = previous.is_some_and(|p| p.prompt == tokens.prompt);
    tokens.completion.len() + if shared { 0 } else { tokens.prompt.len() }
}

fn floats(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.to_dtype(DType::F32)?.to_vec1()?)
}
