//! PPO on language models: the third of InstructGPT's three steps (Ouyang et al. 2022, §3.5, eq. 2; Ziegler et al. 2019;
//! Schulman et al. 2017). The policy answers, a reward model scores the answers, the KL to the reference is taken off
//! token by token, a critic says what was to be expected, and the policy moves towards what was better than that, no
//! further than the clip. RLOO and GRPO are the same loop with the other completions of a prompt in the critic's place.

use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{
    Demonstrations, Group, RolloutTokens, Rollouts, ScoredCompletion, Tokens, UpdateBatch, ValueTokens, Values,
};
use rehearsal_learn::NllReduction;
use rehearsal_learn::group::{grpo, rloo};
use rehearsal_learn::ppo::{ScorePlacement, TokenRewards, explained_variance, gae, instructgpt_objective, whiten};

use super::round::minibatches;
use super::shared::{
    Updates, advance, answer_held_out, checkpoint_if_due, compared_scores, draw_prompts, generated_tokens, log_ratio,
    mean, rollout_stats, tokens,
};
use crate::config::methods::Advantages;
use crate::data::{PromptRow, order};
use crate::error::Result;
use crate::events::{Seconds, StepSummary};
use crate::run::Run;

pub(super) async fn ppo(run: &mut Run) -> Result<()> {
    let schedule = run.config.schedule();
    loop {
        answer_held_out(run).await?;
        checkpoint_if_due(run).await?;
        if run.state.step >= run.config.job.steps {
            return Ok(());
        }
        run.boundary().await?;
        let (start, mut seconds) = (Instant::now(), Seconds::default());
        let version = run.state.counters.updates;

        // 1. Prompts, and the policy's answers with their scores and reference log-probabilities.
        let prompts = draw_prompts(run);
        let groups = run.rollouts(&prompts, version, &mut seconds).await?;

        // 2. What the update compares with: the trainer's own log-probabilities, unfiltered, and the critic's values.
        let mut rollouts = Learned::of(run, &prompts, &groups);
        rollouts.before_update(run, &mut seconds).await?;

        // 3. Rewards, advantages, returns.
        let kl_coef = run.state.kl_coef.unwrap_or(run.config.ppo.kl_coef);
        rollouts.advantages(run, kl_coef);

        // 4. Epochs of minibatches, the critic beside the policy.
        let rate = schedule.rate(run.state.step);
        let (policy, critic) = rollouts.update(run, rate).await?;

        // 5. The step is done: adapt the penalty, count, show.
        let kl = mean(groups.iter().flat_map(|g| &g.completions).map(log_ratio));
        if let Some(adaptive) = &run.config.ppo.adaptive {
            run.state.kl_coef = Some(adaptive.update(kl_coef, kl, rollouts.0.len()));
        }
        seconds.critic += critic.seconds();
        seconds.total = start.elapsed().as_secs_f64();
        let mut stats = rollout_stats(&groups);
        stats.extend(rollouts.stats(kl_coef));
        stats.extend(critic.stats());
        if critic.len() > 0 {
            stats.insert("value_loss", critic.summary(Default::default(), seconds, rate, 0).loss);
        }
        stats.insert("minibatches", policy.len() as f64);
        let summary = policy.summary(stats, seconds, rate, version);
        advance(run, StepSummary { generated_tokens: generated_tokens(&groups), ..summary }, prompts.len())?;
    }
}

/// A completion on its way to an update.
struct Rollout {
    tokens: Tokens,
    /// As the critic reads them: with a place past the end, where the score is paid there.
    valued: Tokens,
    /// As it is learned from: clipped completions have lost their penalty.
    score: f64,
    sampler: Vec<f32>,
    old: Vec<f64>,
    reference: Vec<f64>,
    values: Vec<f64>,
    advantages: Vec<f64>,
    returns: Vec<f64>,
}

/// The completions of a step, those of one prompt side by side.
struct Learned(Vec<Rollout>);

impl Learned {
    fn of(run: &Run, prompts: &[PromptRow], groups: &[Group]) -> Self {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect();
        let one = |group: &Group, c: &ScoredCompletion, score: f64| {
            let tokens = tokens(prompts, group, c);
            let valued = if has_room(run, tokens.completion.len()) { one_longer(&tokens) } else { tokens.clone() };
            Rollout {
                tokens,
                valued,
                score,
                sampler: c.completion.logprobs.clone(),
                old: Vec::new(),
                reference: wide(&c.ref_logprobs),
                values: Vec::new(),
                advantages: Vec::new(),
                returns: Vec::new(),
            }
        };
        let all = groups.iter().flat_map(|g| {
            let scores = compared_scores(run, g);
            g.completions.iter().zip(scores).map(|(c, score)| one(g, c, score)).collect::<Vec<_>>()
        });
        Self(all.collect())
    }

    /// Asks policy and critic about every completion before anything changes.
    async fn before_update(&mut self, run: &Run, seconds: &mut Seconds) -> Result<()> {
        let start = Instant::now();
        let all = || self.0.iter().map(|r| r.tokens.clone()).collect::<Vec<_>>();
        let temperature = run.config.rollout.sampling.logprob_temperature();
        let old = run.roles.policy()?.logprobs(all(), temperature).await?;
        seconds.reference += start.elapsed().as_secs_f64();
        let start = Instant::now();
        let values = match run.config.ppo.advantages {
            Advantages::Gae => {
                let valued = self.0.iter().map(|r| r.valued.clone()).collect();
                run.roles.critic()?.values(valued).await?
            }
            _ => vec![Vec::new(); self.0.len()],
        };
        seconds.critic += start.elapsed().as_secs_f64();
        let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect();
        for ((rollout, old), values) in self.0.iter_mut().zip(old).zip(values) {
            (rollout.old, rollout.values) = (wide(old), wide(values));
        }
        Ok(())
    }

    fn advantages(&mut self, run: &Run, kl_coef: f64) {
        let config = &run.config.ppo;
        let rewards = TokenRewards {
            kl_coef,
            estimator: config.kl_estimator,
            placement: config.placement,
            score_clip: config.score_clip,
        };
        let mut all: Vec<Vec<f64>> =
            self.0.iter().map(|r| rewards.of(r.score, &r.old, &r.reference, has_room(run, r.old.len()))).collect();
        let whitened = |rows: &mut [Vec<f64>], shift: bool| {
            let mut flat = rows.concat();
            whiten(&mut flat, true, shift);
            let mut flat = flat.into_iter();
            rows.iter_mut().flatten().for_each(|x| *x = flat.next().unwrap_or_default());
        };
        if config.whiten_rewards {
            whitened(&mut all, false);
        }
        let group = run.config.rollout.completions_per_prompt;
        let total: Vec<f64> = all.iter().map(|r| r.iter().sum()).collect();
        let of_group = match config.advantages {
            Advantages::Gae => {
                let both =
                    self.0.iter().zip(&all).map(|(r, rewards)| gae(&r.values, rewards, config.gamma, config.lambda));
                let (mut advantages, returns): (Vec<_>, Vec<_>) = both.unzip();
                // What lies past the end was not said, so nobody is to be praised for it.
                advantages.iter_mut().zip(&self.0).for_each(|(a, r)| a.truncate(r.old.len()));
                if config.whiten_advantages {
                    whitened(&mut advantages, true);
                }
                for ((r, a), g) in self.0.iter_mut().zip(advantages).zip(returns) {
                    (r.advantages, r.returns) = (a, g);
                }
                return;
            }
            // Without a critic a completion has one advantage, with the KL penalty inside its reward.
            Advantages::Rloo => rloo(&total, group),
            Advantages::Grpo(scale) => grpo(&total, group, scale, 1e-4),
        };
        for (r, advantage) in self.0.iter_mut().zip(of_group) {
            r.advantages = vec![advantage; r.old.len()];
        }
    }

    /// Updates of the policy and of the critic, until the policy has moved too far.
    async fn update(&self, run: &mut Run, rate: f64) -> Result<(Updates, Updates)> {
        let (mut policy, mut critic) = (Updates::default(), Updates::default());
        let config = &run.config.ppo.clone();
        let parts = minibatches(run.config.job.seed, run.state.step, self.0.len(), run.config.update);
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        for (index, part) in parts.iter().enumerate() {
            let of = |r: &Rollout| RolloutTokens {
                tokens: r.tokens.clone(),
                old_logprobs: narrow(&r.old),
                advantages: narrow(&r.advantages),
                ref_logprobs: narrow(&r.reference),
            };
            let objective = Arc::new(Rollouts {
                rollouts: part.iter().map(|&i| of(&self.0[i])).collect(),
                loss: config.loss,
                pretraining: pretraining(run, parts.len(), index),
            });
            let report = run.learn(objective, rate).await?;
            let moved = report.stats.get("approx_kl").copied().unwrap_or(0.0);
            policy.add(report);
            if config.advantages == Advantages::Gae {
                let of = |r: &Rollout| ValueTokens {
                    tokens: r.valued.clone(),
                    old_values: narrow(&r.values),
                    returns: narrow(&r.returns),
                };
                let rollouts = part.iter().map(|&i| of(&self.0[i])).collect();
                let objective = Arc::new(Values { rollouts, clip: config.value_clip });
                // The critic's schedule is the policy's, at its own height.
                let height = run.config.critic.learning_rate.unwrap_or(run.config.optimizer.learning_rate);
                let learning_rate = rate * height / run.config.optimizer.learning_rate;
                let batch = UpdateBatch { objective, learning_rate, temperature: 1.0 };
                run.settle().await?;
                critic.add(run.roles.critic()?.step(batch, run.cancel.clone()).await?);
            }
            if config.stop_kl.is_some_and(|limit| moved > limit) {
                break;
            }
        }
        Ok((policy, critic))
    }

    fn stats(&self, kl_coef: f64) -> super::shared::Stats {
        let flat = |of: fn(&Rollout) -> &Vec<f64>| -> Vec<f64> { self.0.iter().flat_map(of).copied().collect() };
        let (values, returns) = (flat(|r| &r.values), flat(|r| &r.returns));
        let scores: Vec<f64> = self.0.iter().map(|r| r.score).collect();
        let ratio = |r: &Rollout| r.old.iter().zip(&r.reference).map(|(p, q)| p - q).sum();
        let ratios: Vec<f64> = self.0.iter().map(ratio).collect();
        let mut stats = super::shared::Stats::from([
            ("kl_coef", kl_coef),
            ("advantage", mean(flat(|r| &r.advantages).into_iter())),
            ("objective", instructgpt_objective(&scores, &ratios, kl_coef, &[], 0.0)),
            ("mismatch_kl", self.mismatch()),
        ]);
        if !returns.is_empty() {
            stats.insert("value", mean(values.iter().copied()));
            stats.insert("return", mean(returns.iter().copied()));
            stats.insert("explained_variance", explained_variance(&values, &returns));
        }
        stats
    }

    /// k3 estimate of KL(sampler ‖ trainer) per token: the two must be one distribution, whatever filters the sampler
    /// used, or the KL to the reference would be that of another policy.
    fn mismatch(&self) -> f64 {
        let of = |(old, sampler): (&f64, &f32)| {
            let d = old - f64::from(*sampler);
            d.exp_m1() - d
        };
        mean(self.0.iter().flat_map(|r| r.old.iter().zip(&r.sampler).map(of)))
    }
}

/// Whether there is a place past the last of a completion's `n` tokens that its score is paid at.
fn has_room(run: &Run, n: usize) -> bool {
    let config = &run.config.ppo;
    let critic = config.advantages == Advantages::Gae;
    critic && config.placement == ScorePlacement::OnePast && n < run.config.rollout.max_new_tokens
}

/// A completion with a token behind its last, which nothing reads: the value before it is that of the end.
fn one_longer(tokens: &Tokens) -> Tokens {
    let completion = [tokens.completion.as_slice(), &[0]].concat();
    Tokens { prompt: tokens.prompt.clone(), completion: Arc::new(completion) }
}

/// The pretraining rows of a minibatch, and their weight.
fn pretraining(run: &Run, minibatches: usize, index: usize) -> Option<(Demonstrations, f64)> {
    let (config, rows) = (&run.config.ppo, &run.pretraining);
    if rows.is_empty() || config.pretraining_weight == 0.0 {
        return None;
    }
    let n = config.pretraining_rows;
    let cursor = (run.state.step * minibatches as u64 + index as u64) * n as u64;
    let drawn = order(run.config.job.seed, cursor, n, rows.len());
    let sequences = drawn.into_iter().map(|i| rows[i].clone()).collect();
    Some((Demonstrations { sequences, reduction: NllReduction::TokenMean }, config.pretraining_weight))
}
