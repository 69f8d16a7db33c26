//! Pairs of a step's completions: for the update, and in numbers.

use std::sync::Arc;

use rehearsal_actors::{Group, PairTokens, ScoredCompletion, Tokens};
use rehearsal_learn::pairs::Pair;

use crate::data::PromptRow;
use crate::driver::{Stats, mean};

/// Tokens of a completion after its prompt's.
pub fn tokens(prompts: &[PromptRow], group: &Group, c: &ScoredCompletion) -> Tokens {
    Tokens { prompt: prompts[group.prompt as usize].tokens.clone(), completion: Arc::new(c.completion.tokens.clone()) }
}

/// A pair of a prompt's completions, with the reference's log-probabilities.
pub fn pair_tokens(prompts: &[PromptRow], group: &Group, pair: Pair) -> PairTokens {
    let (chosen, rejected) = (&group.completions[pair.chosen], &group.completions[pair.rejected]);
    PairTokens {
        chosen: tokens(prompts, group, chosen),
        rejected: tokens(prompts, group, rejected),
        sampler_chosen: chosen.completion.logprobs.clone(),
        sampler_rejected: rejected.completion.logprobs.clone(),
        ref_chosen: chosen.ref_logprobs.clone(),
        ref_rejected: rejected.ref_logprobs.clone(),
        score_gap: Some(chosen.judged.score - rejected.judged.score),
    }
}

/// The metrics of the pairs that a step's prompts made; `None` is a prompt without one.
pub fn pair_stats(pairs: &[Option<Pair>]) -> Stats {
    let made: Vec<&Pair> = pairs.iter().flatten().collect();
    Stats::from([
        ("pairs", made.len() as f64),
        ("ties", (pairs.len() - made.len()) as f64),
        ("score_margin", mean(made.iter().map(|p| p.margin))),
    ])
}
