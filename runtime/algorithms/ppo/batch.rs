//! The completions of a step as PPO learns from them: rewards, advantages, returns.

use std::sync::Arc;

use rehearsal_actors::{Group, ScoredCompletion, Tokens};
use rehearsal_learn::group::{grpo_of, rloo_of};
use rehearsal_learn::ppo::{ScorePlacement, TokenRewards, explained_variance, gae, instructgpt_objective, whiten};
use rehearsal_learn::{ImportanceConfig, importance_weights};

use super::Ppo;
use super::settings::Advantages;
use crate::algorithms::shared::pairs::tokens;
use crate::algorithms::shared::preference::compared_scores;
use crate::data::PromptRow;
use crate::driver::{Stats, mean};
use crate::error::{Error, Result};

/// One completion; vectors have a value for each of its tokens.
pub struct PpoSample {
    /// Index of its prompt in the step.
    pub prompt: u32,
    pub tokens: Tokens,
    /// As the critic reads them: with a position past the end, where the score is placed there.
    pub valued: Tokens,
    /// Score minus the missing-EOS penalty if truncated.
    pub score: f64,
    /// Log-probabilities while sampling.
    sampler: Vec<f32>,
    /// Log-probabilities that ratios are against: under the trainer before the update, or while sampling.
    pub old: Vec<f64>,
    /// Importance weights; empty where there are none.
    pub weights: Vec<f64>,
    /// Log-probabilities under the reference.
    pub reference: Vec<f64>,
    pub values: Vec<f64>,
    pub advantages: Vec<f64>,
    pub returns: Vec<f64>,
    /// Whether the score is placed one past the last token.
    one_past: bool,
}

/// The completions of a step; those of a prompt are neighbours.
pub struct PpoBatch(
    pub Vec<PpoSample>,
    /// Completions of each prompt.
    Vec<usize>,
);

impl PpoBatch {
    /// The completions without what the roles have yet to compute.
    pub fn new(settings: &Ppo, prompts: &[PromptRow], groups: &[Group]) -> Self {
        let one = |group: &Group, c: &ScoredCompletion, score: f64| {
            let tokens = tokens(prompts, group, c);
            let one_past = one_past(settings, tokens.completion.len());
            let valued = if one_past { one_longer(&tokens) } else { tokens.clone() };
            PpoSample {
                prompt: group.prompt,
                tokens,
                valued,
                score,
                sampler: c.completion.logprobs.clone(),
                old: Vec::new(),
                weights: Vec::new(),
                reference: wide(&c.ref_logprobs),
                values: Vec::new(),
                advantages: Vec::new(),
                returns: Vec::new(),
                one_past,
            }
        };
        let all = groups.iter().flat_map(|g| {
            let scores = compared_scores(g, settings.loss.missing_eos_penalty);
            g.completions.iter().zip(scores).map(|(c, score)| one(g, c, score)).collect::<Vec<_>>()
        });
        Self(all.collect(), groups.iter().map(|g| g.completions.len()).collect())
    }

    /// The tokens of every completion.
    pub fn tokens(&self) -> Vec<Tokens> {
        self.0.iter().map(|s| s.tokens.clone()).collect()
    }

    /// The tokens of every completion as the critic reads them.
    pub fn valued(&self) -> Vec<Tokens> {
        self.0.iter().map(|s| s.valued.clone()).collect()
    }

    /// Log-probabilities while sampling, one vector for each completion.
    pub fn sampled(&self) -> Vec<Vec<f32>> {
        self.0.iter().map(|s| s.sampler.clone()).collect()
    }

    /// Sets importance weights, for the difference between the policy before the update and the one that sampled.
    pub fn weigh(&mut self, config: &ImportanceConfig) {
        for s in &mut self.0 {
            s.weights = importance_weights(&s.old, &wide(&s.sampler), config);
        }
    }

    /// Sets the trainer's log-probabilities and the critic's values, one vector for each completion.
    pub fn set(&mut self, old: Vec<Vec<f32>>, values: Vec<Vec<f32>>) -> Result<()> {
        let n = self.0.len();
        if old.len() != n || values.len() != n {
            let (old, values) = (old.len(), values.len());
            let message = format!("{n} completions have {old} rows of log-probabilities and {values} of values");
            return Err(Error::Internal(message));
        }
        for ((sample, old), values) in self.0.iter_mut().zip(old).zip(values) {
            (sample.old, sample.values) = (wide(&old), wide(&values));
        }
        Ok(())
    }

    /// Computes rewards, and from them advantages and returns. `kl_coef` is the coefficient of the KL penalty.
    pub fn advantages(&mut self, settings: &Ppo, kl_coef: f64) {
        let ppo = &settings.ppo;
        let rewards =
            TokenRewards { kl_coef, estimator: ppo.kl_estimator, placement: ppo.placement, score_clip: ppo.score_clip };
        let mut all: Vec<Vec<f64>> =
            self.0.iter().map(|s| rewards.of(s.score, &s.old, &s.reference, s.one_past)).collect();
        if ppo.whiten_rewards {
            whiten_rows(&mut all, false);
        }
        let total: Vec<f64> = all.iter().map(|r| r.iter().sum()).collect();
        // Without a critic a completion has one advantage, with the KL penalty inside its reward.
        let of_group = match ppo.advantages {
            Advantages::Gae => return self.gae(settings, &all),
            Advantages::Rloo => rloo_of(self.groups(&total)),
            Advantages::Grpo(scale) => grpo_of(&total, self.groups(&total), scale, 1e-4),
        };
        for (s, advantage) in self.0.iter_mut().zip(of_group) {
            s.advantages = vec![advantage; s.old.len()];
        }
    }

    /// Values of all completions, group by group.
    fn groups<'a>(&'a self, all: &'a [f64]) -> impl Iterator<Item = &'a [f64]> {
        let mut rest = all;
        self.1.iter().map(move |&size| {
            let (group, others) = rest.split_at(size.min(rest.len()));
            rest = others;
            group
        })
    }

    fn gae(&mut self, settings: &Ppo, rewards: &[Vec<f64>]) {
        let ppo = &settings.ppo;
        let both = self.0.iter().zip(rewards).map(|(s, rewards)| gae(&s.values, rewards, ppo.gamma, ppo.lambda));
        let (mut advantages, returns): (Vec<_>, Vec<_>) = both.unzip();
        // The position past the end holds no token of the policy's, so it has no advantage.
        advantages.iter_mut().zip(&self.0).for_each(|(a, s)| a.truncate(s.old.len()));
        if ppo.whiten_advantages {
            whiten_rows(&mut advantages, true);
        }
        for ((s, advantages), returns) in self.0.iter_mut().zip(advantages).zip(returns) {
            (s.advantages, s.returns) = (advantages, returns);
        }
    }

    /// The metrics of the batch before its update.
    pub fn stats(&self, kl_coef: f64) -> Stats {
        let flat = |of: fn(&PpoSample) -> &Vec<f64>| -> Vec<f64> { self.0.iter().flat_map(of).copied().collect() };
        let (values, returns) = (flat(|s| &s.values), flat(|s| &s.returns));
        let scores: Vec<f64> = self.0.iter().map(|s| s.score).collect();
        let ratio = |s: &PpoSample| s.old.iter().zip(&s.reference).map(|(p, q)| p - q).sum();
        let ratios: Vec<f64> = self.0.iter().map(ratio).collect();
        let mut stats = Stats::from([
            ("kl_coef", kl_coef),
            ("advantage", mean(flat(|s| &s.advantages).into_iter())),
            ("objective", instructgpt_objective(&scores, &ratios, kl_coef, &[], 0.0)),
            ("mismatch_kl", self.mismatch()),
        ]);
        let weights = flat(|s| &s.weights);
        if !weights.is_empty() {
            stats.insert("importance_weight", mean(weights.iter().copied()));
            stats.insert("importance_weight_max", weights.iter().copied().fold(0.0, f64::max));
            stats.insert("importance_masked", mean(weights.iter().map(|w| f64::from(u8::from(*w == 0.0)))));
        }
        if !returns.is_empty() {
            stats.insert("value", mean(values.iter().copied()));
            stats.insert("return", mean(returns.iter().copied()));
            stats.insert("explained_variance", explained_variance(&values, &returns));
        }
        stats
    }

    /// k3 estimate of KL(sampler ‖ trainer) per token, in nats: the two must be one distribution, whatever filters the
    /// sampler used, or the KL to the reference would be that of another policy.
    fn mismatch(&self) -> f64 {
        let of = |(old, sampler): (&f64, &f32)| {
            let d = old - f64::from(*sampler);
            d.exp_m1() - d
        };
        mean(self.0.iter().flat_map(|s| s.old.iter().zip(&s.sampler).map(of)))
    }
}

/// Values as the model computes with.
pub fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Whitens all rows together; `shift`: to a mean of 0 too.
fn whiten_rows(rows: &mut [Vec<f64>], shift: bool) {
    let mut flat = rows.concat();
    whiten(&mut flat, true, shift);
    rows.iter_mut().flatten().zip(flat).for_each(|(x, whitened)| *x = whitened);
}

/// Whether the score of a completion of `n` tokens is placed one past the last.
fn one_past(settings: &Ppo, n: usize) -> bool {
    let ppo = &settings.ppo;
    let critic = ppo.advantages == Advantages::Gae;
    critic && ppo.placement == ScorePlacement::OnePast && n < settings.online.rollout.max_new_tokens
}

/// A completion with one more token, which nothing reads: the value before it is that of the end.
fn one_longer(tokens: &Tokens) -> Tokens {
    let completion = [tokens.completion.as_slice(), &[0]].concat();
    Tokens { prompt: tokens.prompt.clone(), completion: Arc::new(completion) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_row_is_an_error() {
        let mut batch = PpoBatch(Vec::new(), Vec::new());
        assert!(batch.set(Vec::new(), Vec::new()).is_ok());
        let error = batch.set(vec![vec![-1.0]], Vec::new()).unwrap_err().to_string();
        assert!(error.contains("0 completions have 1 rows"), "{error}");
    }
}
