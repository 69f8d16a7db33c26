//! Passes over many sequences without gradients, in micro-batches of bounded size.

use candle_core::{DType, Tensor};
use rehearsal_lm::{Batch, Decoder, Sequence};

use crate::{Marked, Result, Tokens};

/// Log-probabilities of completions, token by token.
pub(crate) fn logprobs(decoder: &Decoder, tokens: &[Tokens], temperature: f64, budget: usize) -> Result<Vec<Vec<f32>>> {
    by_token(tokens, budget, |batch| decoder.logprobs(batch, temperature))
}

/// Summed log-probabilities of the marked tokens of each sequence.
pub(crate) fn likelihoods(decoder: &Decoder, sequences: &[Marked], budget: usize) -> Result<Vec<f64>> {
    let (mut all, mut rest) = (Vec::with_capacity(sequences.len()), sequences);
    while !rest.is_empty() {
        let mut sum = 0;
        let fitting = rest.iter().take_while(|s| {
            sum += s.tokens.len();
            sum <= budget
        });
        let (now, later) = rest.split_at(fitting.count().max(1));
        let batch = Batch::marked(now.iter().map(|s| (s.tokens.as_slice(), s.marks.as_slice())));
        let flat = floats(&decoder.logprobs(&batch, 1.0)?)?;
        let sums = batch.spans().windows(2).map(|w| flat[w[0]..w[1]].iter().map(|&x| f64::from(x)).sum::<f64>());
        all.extend(sums);
        rest = later;
    }
    Ok(all)
}

/// Values of completions: that of each token is read before it.
pub(crate) fn values(decoder: &Decoder, tokens: &[Tokens], budget: usize) -> Result<Vec<Vec<f32>>> {
    by_token(tokens, budget, |batch| decoder.values(batch))
}

/// Scores of whole sequences, read where the model's padding says.
pub(crate) fn scores(decoder: &Decoder, tokens: &[Tokens], budget: usize) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(tokens.len());
    for part in parts(tokens, budget) {
        let kept = part.iter().map(|t| scored(decoder, t));
        let batch = Batch::ends(kept);
        all.extend(floats(&decoder.values(&batch)?)?);
    }
    Ok(all)
}

/// What of a sequence a score is read from: up to the last token that is no padding (transformers' rule; where padding
/// is the end-of-sequence token, the score is read before it).
pub(crate) fn scored<'a>(decoder: &Decoder, tokens: &'a Tokens) -> Sequence<'a> {
    let pad = decoder.architecture().pad;
    let end = tokens.completion.iter().rposition(|&t| Some(t) != pad).map_or(0, |last| last + 1);
    Sequence { prompt: &tokens.prompt, completion: &tokens.completion[..end] }
}

fn by_token(
    tokens: &[Tokens],
    budget: usize,
    pass: impl Fn(&Batch) -> rehearsal_lm::Result<Tensor>,
) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(tokens.len());
    for part in parts(tokens, budget) {
        let batch = Batch::new(part.iter().map(Tokens::sequence));
        let flat = floats(&pass(&batch)?)?;
        all.extend(batch.spans().windows(2).map(|w| flat[w[0]..w[1]].to_vec()));
    }
    Ok(all)
}

/// Consecutive sequences of at most `budget` tokens together, and at least one.
fn parts(tokens: &[Tokens], budget: usize) -> impl Iterator<Item = &[Tokens]> {
    let mut rest = tokens;
    std::iter::from_fn(move || {
        let (mut sum, mut before): (usize, Option<&Tokens>) = (0, None);
        let fitting = rest.iter().take_while(|t| {
            // Neighbours share their prompt.
            let shared = before.is_some_and(|b| b.prompt == t.prompt);
            sum += t.completion.len() + if shared { 0 } else { t.prompt.len() };
            before = Some(t);
            sum <= budget
        });
        let n = fitting.count().max(1).min(rest.len());
        let (now, later) = rest.split_at(n);
        rest = later;
        (!now.is_empty()).then_some(now)
    })
}

fn floats(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.to_dtype(DType::F32)?.to_vec1()?)
}
