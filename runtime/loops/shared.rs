//! What loops do between and after steps.

use std::collections::BTreeMap;
use std::sync::Arc;

use rehearsal_actors::{Group, PairTokens, ScoredCompletion, StepReport, StepTimes, Tokens};
use rehearsal_learn::pairs::{Pair, penalise_missing_eos};
use rehearsal_lm::generate::Finish;
use rehearsal_store::Preference;

use crate::data::PromptRow;
use crate::error::Result;
use crate::events::{Seconds, StepSummary};
use crate::run::{Run, now_ms};
use crate::state::{Answer, Evaluation};

/// Numbers of a step by the names of their metrics.
pub type Stats = BTreeMap<&'static str, f64>;

/// Begins to save a checkpoint if one is due between two steps; it is written while the next completions are generated.
pub async fn checkpoint_if_due(run: &mut Run) -> Result<()> {
    let (step, every) = (run.state.step, run.config.checkpoint.every_steps);
    let due = step > 0 && (step.is_multiple_of(every) || step >= run.config.job.steps);
    if due { run.begin_checkpoint().await } else { Ok(()) }
}

/// Whether an evaluation is due between two steps and not done.
pub fn evaluation_due(run: &Run) -> bool {
    let (step, every) = (run.state.step, run.config.evaluation.every_steps);
    let due = every > 0 && (step.is_multiple_of(every) || step >= run.config.job.steps);
    due && run.state.evaluations.last().is_none_or(|e| e.step != step)
}

/// The prompts of a step.
pub fn draw_prompts(run: &Run) -> Vec<PromptRow> {
    let n = run.config.rollout.prompts_per_step;
    run.prompts.draw(run.config.job.seed, run.state.cursor, n).into_iter().cloned().collect()
}

/// Scores of a prompt's completions as they are compared: less for those that were cut off.
pub fn compared_scores(run: &Run, group: &Group) -> Vec<f64> {
    let penalty = run.config.loss.missing_eos_penalty;
    let score =
        |c: &ScoredCompletion| penalise_missing_eos(c.judged.score, c.completion.finish != Finish::Length, penalty);
    group.completions.iter().map(score).collect()
}

/// Tokens of a completion.
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

/// What the ledger keeps of a prompt's comparison.
pub fn entry(run: &Run, prompt: &PromptRow, group: &Group, pair: Option<Pair>, policy_version: u64) -> Preference {
    Preference {
        step: run.state.step,
        index: group.prompt,
        row: prompt.row,
        policy_version,
        prompt: prompt.prompt.clone(),
        completions: group.completions.iter().map(|c| c.text.clone()).collect(),
        scores: group.completions.iter().map(|c| c.judged.score).collect(),
        reasons: group.completions.iter().map(|c| c.judged.reason.clone()).collect(),
        pair: pair.map(|p| (p.chosen as u32, p.rejected as u32)),
        time_ms: now_ms(),
        judge: run.roles.reward.as_ref().map_or_else(String::new, |r| r.name().to_string()),
        exchanges: group.completions.iter().flat_map(|c| c.judged.exchanges.iter().cloned()).collect(),
    }
}

/// `Σ_t [log π(y_t) - log π_ref(y_t)]` of one completion.
pub fn log_ratio(c: &ScoredCompletion) -> f64 {
    c.completion.logprobs.iter().zip(&c.ref_logprobs).map(|(p, r)| f64::from(*p) - f64::from(*r)).sum()
}

/// The mean, or 0 of nothing.
pub fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), x| (sum + x, n + 1));
    if n == 0 { 0.0 } else { sum / f64::from(n) }
}

/// What is worth watching of a step's completions.
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

/// What is worth watching of the pairs that a step's prompts made.
pub fn pair_stats(pairs: &[Option<Pair>]) -> Stats {
    let made: Vec<&Pair> = pairs.iter().flatten().collect();
    Stats::from([
        ("pairs", made.len() as f64),
        ("ties", (pairs.len() - made.len()) as f64),
        ("score_margin", mean(made.iter().map(|p| p.margin))),
    ])
}

/// Tokens of a step's completions.
pub fn generated_tokens(groups: &[Group]) -> usize {
    groups.iter().flat_map(|g| &g.completions).map(|c| c.completion.tokens.len()).sum()
}

/// A step's updates, added up: the last one's loss and norm, the means of their statistics.
#[derive(Default)]
pub struct Updates {
    reports: Vec<StepReport>,
}

impl Updates {
    pub fn add(&mut self, report: StepReport) {
        self.reports.push(report);
    }

    /// The mean of a statistic over the updates.
    pub fn stats(&self) -> Stats {
        let mut sums: BTreeMap<&'static str, (f64, f64)> = BTreeMap::new();
        for (name, value) in self.reports.iter().flat_map(|r| &r.stats) {
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + value, sum.1 + 1.0);
        }
        sums.into_iter().map(|(name, (sum, n))| (name, sum / n)).collect()
    }

    /// How many there were.
    pub fn len(&self) -> usize {
        self.reports.len()
    }

    /// Seconds that all of them took.
    pub fn seconds(&self) -> f64 {
        let times = self.times();
        (times.forward + times.backward + times.optimizer).as_secs_f64()
    }

    fn times(&self) -> StepTimes {
        let mut times = StepTimes::default();
        self.reports.iter().for_each(|r| times.add(&r.times));
        times
    }

    /// The summary of a step; `stats` come before those of the updates.
    pub fn summary(&self, mut stats: Stats, seconds: Seconds, learning_rate: f64, version: u64) -> StepSummary {
        let (last, times) = (self.reports.last(), self.times());
        stats.extend(self.stats());
        StepSummary {
            step: 0,
            version: last.map_or(version, |r| r.version),
            loss: last.map_or(0.0, |r| r.loss),
            gradient_norm: last.map_or(0.0, |r| r.grad_norm),
            learning_rate,
            generated_tokens: 0,
            trained_tokens: self.reports.iter().map(|r| r.tokens).sum(),
            stats,
            seconds: Seconds {
                forward: times.forward.as_secs_f64(),
                backward: times.backward.as_secs_f64(),
                optimizer: times.optimizer.as_secs_f64(),
                ..seconds
            },
        }
    }
}

/// Counts a step that is done, and shows it. `drawn` prompts or rows were used.
pub fn advance(run: &mut Run, summary: StepSummary, drawn: usize) -> Result<()> {
    let stat = |name: &str| summary.stat(name).unwrap_or(0.0);
    let completions = if summary.generated_tokens > 0 { run.config.completions_per_step() } else { 0 };
    let state = &mut run.state;
    state.step += 1;
    state.cursor += drawn as u64;
    let c = &mut state.counters;
    c.steps += 1;
    c.updates = summary.version;
    c.rollouts += completions as u64;
    c.generated_tokens += summary.generated_tokens as u64;
    c.trained_tokens += summary.trained_tokens as u64;
    c.pairs += stat("pairs") as u64;
    c.ties += stat("ties") as u64;
    c.truncated += (stat("truncated") * completions as f64).round() as u64;
    let step = state.step;
    run.step_done(StepSummary { step, ..summary })
}

/// Answers the held-out prompts, each time with the same random numbers: differences are the policy's own.
pub async fn answer_held_out(run: &mut Run) -> Result<()> {
    if !evaluation_due(run) || run.prompts.held_out.is_empty() {
        return Ok(());
    }
    let prompts = run.prompts.held_out.clone();
    let answers = run.evaluation_answers(&prompts).await?;
    let shown = answers.iter().take(run.config.evaluation.samples);
    let stats = [
        ("reward", mean(answers.iter().map(|(a, _)| a.judged.score))),
        ("kl", mean(answers.iter().map(|(a, _)| log_ratio(a)))),
        ("tokens", mean(answers.iter().map(|(a, _)| a.completion.tokens.len() as f64))),
    ];
    let evaluation = Evaluation {
        step: run.state.step,
        stats: stats.map(|(name, value)| (name.to_string(), value)).into(),
        samples: shown
            .map(|(a, i)| Answer {
                prompt: prompts[*i].text.clone(),
                completion: a.text.clone(),
                score: a.judged.score,
            })
            .collect(),
    };
    run.evaluated(evaluation)
}
