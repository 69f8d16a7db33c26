//! Numbers of a step's completions.

use rehearsal_actors::{Group, ScoredCompletion};
use rehearsal_lm::generate::Finish;

use crate::driver::stats::{Stats, mean};

/// `Σ_t [log π(y_t) - log π_ref(y_t)]` of one completion, in nats.
pub fn log_ratio(c: &ScoredCompletion) -> f64 {
    c.completion.logprobs.iter().zip(&c.ref_logprobs).map(|(p, r)| f64::from(*p) - f64::from(*r)).sum()
}

/// The metrics of a step's completions.
pub fn rollout_stats(groups: &[Group]) -> Stats {
    let all = || groups.iter().flat_map(|g| &g.completions);
    let scores = || all().map(|c| c.judged.score);
    let reward = mean(scores());
    Stats::from([
        ("reward", reward),
        ("reward_std", mean(scores().map(|s| (s - reward).powi(2))).sqrt()),
        ("reward_min", scores().reduce(f64::min).unwrap_or(0.0)),
        ("reward_max", scores().reduce(f64::max).unwrap_or(0.0)),
        ("kl", mean(all().map(log_ratio))),
        ("entropy", mean(all().flat_map(|c| &c.completion.logprobs).map(|&p| -f64::from(p)))),
        ("completion_tokens", mean(all().map(|c| c.completion.tokens.len() as f64))),
        ("truncated", mean(all().map(|c| f64::from(c.completion.finish == Finish::Length)))),
    ])
}

/// Tokens of a step's completions.
pub fn generated_tokens(groups: &[Group]) -> usize {
    groups.iter().flat_map(|g| &g.completions).map(|c| c.completion.tokens.len()).sum()
}
