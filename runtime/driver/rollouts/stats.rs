//! Numbers of a step's completions.

use rehearsal_actors::{Group, ScoredCompletion};
use rehearsal_lm::generate::Finish;

use crate::driver::stats::{Stats, mean, quantile};

/// `Σ_t [log π(y_t) - log π_ref(y_t)]` of one completion, in nats.
pub fn log_ratio(c: &ScoredCompletion) -> f64 {
    c.completion.logprobs.iter().zip(&c.ref_logprobs).map(|(p, r)| f64::from(*p) - f64::from(*r)).sum()
}

/// The metrics of a step's completions.
pub fn rollout_stats(groups: &[Group]) -> Stats {
    let all = || groups.iter().flat_map(|g| &g.completions);
    let scores = || all().map(|c| c.judged.score);
    let reward = mean(scores());
    let sorted = |values: &mut dyn Iterator<Item = f64>| {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let by_score = sorted(&mut scores());
    let by_length = sorted(&mut all().map(|c| c.completion.tokens.len() as f64));
    Stats::from([
        ("reward", reward),
        ("reward_std", mean(scores().map(|s| (s - reward).powi(2))).sqrt()),
        ("reward_min", quantile(&by_score, 0.0)),
        ("reward_p10", quantile(&by_score, 0.1)),
        ("reward_p50", quantile(&by_score, 0.5)),
        ("reward_p90", quantile(&by_score, 0.9)),
        ("reward_max", quantile(&by_score, 1.0)),
        ("kl", mean(all().map(log_ratio))),
        ("entropy", mean(all().flat_map(|c| &c.completion.logprobs).map(|&p| -f64::from(p)))),
        ("completion_tokens", mean(by_length.iter().copied())),
        ("completion_tokens_p10", quantile(&by_length, 0.1)),
        ("completion_tokens_p50", quantile(&by_length, 0.5)),
        ("completion_tokens_p90", quantile(&by_length, 0.9)),
        ("completion_tokens_max", quantile(&by_length, 1.0)),
        ("truncated", mean(all().map(|c| f64::from(c.completion.finish == Finish::Length)))),
    ])
}

/// Tokens of a step's completions.
pub fn generated_tokens(groups: &[Group]) -> usize {
    groups.iter().flat_map(|g| &g.completions).map(|c| c.completion.tokens.len()).sum()
}
