//! Pairs of a step's completions: for the update, for the ledger, and in numbers.

use std::sync::Arc;

use rehearsal_actors::{Group, PairTokens, ScoredCompletion, Tokens};
use rehearsal_learn::pairs::Pair;
use rehearsal_store::Preference;

use crate::data::PromptRow;
use crate::driver::{Rollouts, Run, Stats, mean};
use crate::error::Result;
use crate::time::now_ms;

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

/// Writes the comparisons of a step's prompts into the ledger; `pairs` has one for each group, `None` for a tie.
pub async fn log_preferences(
    run: &Run,
    rollouts: &Rollouts,
    prompts: &[PromptRow],
    groups: &[Group],
    pairs: impl Iterator<Item = Option<Pair>>,
) -> Result<()> {
    let entry = |(group, pair): (&Group, Option<Pair>)| {
        let prompt = &prompts[group.prompt as usize];
        Preference {
            step: run.state.step,
            index: group.prompt,
            row: prompt.row,
            policy_version: run.version(),
            prompt: prompt.prompt.clone(),
            completions: group.completions.iter().map(|c| c.text.clone()).collect(),
            scores: group.completions.iter().map(|c| c.judged.score).collect(),
            reasons: group.completions.iter().map(|c| c.judged.reason.clone()).collect(),
            pair: pair.map(|p| (p.chosen as u32, p.rejected as u32)),
            time_ms: now_ms(),
            judge: rollouts.reward.name().to_string(),
            exchanges: group.completions.iter().flat_map(|c| c.judged.exchanges.iter().cloned()).collect(),
        }
    };
    Ok(run.roles.archivist.log_preferences(groups.iter().zip(pairs).map(entry).collect()).await?)
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
