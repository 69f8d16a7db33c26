//! PPO on language models: the third of InstructGPT's three steps (Ouyang et al. 2022, §3.5, eq. 2; Ziegler et al. 2019;
//! Schulman et al. 2017). The policy answers prompts, a source of rewards scores the completions, the KL to the reference is
//! subtracted token by token, a critic estimates values, and the clipped surrogate moves the policy along the advantages.
//! RLOO and GRPO are the same loop with the prompt's other completions in place of the critic.

mod batch;
mod metrics;
mod settings;

use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{
    CriticHandle, Cut, Demonstrations, MaskedSequence, RolloutTokens, Rollouts as PolicyObjective, ValueTokens, Values,
};
use rehearsal_learn::NllReduction;
use rehearsal_lm::Checkpoint;

use self::batch::{PpoBatch, PpoSample, narrow};
pub use self::settings::{Advantages, CriticSettings, OffPolicy, PpoSettings};
use super::shared::minibatches::{UpdateSettings, minibatches};
use super::shared::online::OnlineSettings;
use super::shared::preference::LossSettings;
use crate::config::{Keys, Settings};
use crate::data::{DataSettings, PromptsSettings, order};
use crate::driver::{
    Algorithm, AlgorithmSettings, LoadedAlgorithm, Loader, RolloutInputs, RolloutSettings, Rollouts, Run, Starter,
    Step, Updates, log_ratio, mean, rollout_stats,
};
use crate::error::Result;
use crate::futures::BoxFuture;
use crate::metrics::Metric;
use crate::settings::Common;
use crate::summary::{Evaluation, Seconds};

/// Settings of `ppo`: `[prompts]`, `[rollout]`, `[ppo]`, `[critic]`, `[update]`, of `[loss]` the missing-EOS penalty, and of
/// `[data]` how pretraining text is read.
#[derive(Debug, Clone, PartialEq)]
pub struct Ppo {
    /// Sections of every online algorithm.
    pub online: OnlineSettings,
    /// Advantages, KL penalty and loss: `[ppo]`.
    pub ppo: PpoSettings,
    /// Model and learning rate of the critic: `[critic]`.
    pub critic: CriticSettings,
    /// Epochs and minibatches of a step: `[update]`.
    pub update: UpdateSettings,
    /// Of `[loss]`, what PPO uses.
    pub loss: LossSettings,
    /// Of `[data]`, what the pretraining mix uses.
    pub data: DataSettings,
}

impl Default for Ppo {
    fn default() -> Self {
        let rollout = RolloutSettings { completions_per_prompt: 1, ..RolloutSettings::default() };
        Self {
            online: OnlineSettings { rollout, ..OnlineSettings::default() },
            ppo: PpoSettings::default(),
            critic: CriticSettings::default(),
            update: UpdateSettings::default(),
            loss: LossSettings::default(),
            data: DataSettings::default(),
        }
    }
}

impl Settings for Ppo {
    fn visit(&mut self, keys: &mut Keys) {
        self.online.visit(keys);
        self.ppo.visit(keys);
        self.critic.visit(keys);
        self.update.visit(keys);
        self.loss.visit(keys);
        self.data.visit(keys);
    }
}

impl AlgorithmSettings for Ppo {
    fn prompts(&self) -> Option<&PromptsSettings> {
        Some(&self.online.prompts)
    }

    fn check(&self, common: &Common, keys: &mut Keys) {
        let rollout = &self.online.rollout;
        rollout.check(common, keys);
        if self.ppo.advantages != Advantages::Gae {
            rollout.check_compared(keys, "advantages without a critic need");
        }
        let (minibatches, completions) = (self.update.minibatches, rollout.completions_per_step());
        if minibatches > completions {
            let message = format!("= {minibatches} exceeds the {completions} completions of a step");
            keys.section("update").problem("minibatches", message);
        }
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn metrics(&self) -> &'static [Metric] {
        metrics::METRICS
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        let inputs = self.online.load(loader, true)?;
        let reward_models = loader.rewards()?;
        let critic = match self.ppo.advantages {
            Advantages::Gae => Some(loader.critic(self.critic.model.as_ref(), &reward_models)?),
            _ => None,
        };
        let pretraining = match &self.ppo.pretraining {
            Some(file) => loader.demonstrations(&self.data, &self.online.prompts, file)?,
            None => Vec::new(),
        };
        Ok(Box::new(Loaded { settings: self.clone(), inputs, critic, pretraining }))
    }
}

struct Loaded {
    settings: Ppo,
    inputs: RolloutInputs,
    critic: Option<Arc<Checkpoint>>,
    pretraining: Vec<MaskedSequence>,
}

impl LoadedAlgorithm for Loaded {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            let Loaded { settings, inputs, critic, pretraining } = *self;
            let rollouts = Rollouts::start(inputs, starter).await?;
            let critic = match critic {
                Some(model) => Some(starter.critic(model).await?),
                None => None,
            };
            Ok(Box::new(Running { settings, rollouts, critic, pretraining }) as _)
        })
    }
}

struct Running {
    settings: Ppo,
    rollouts: Rollouts,
    /// Where advantages are [`Advantages::Gae`].
    critic: Option<CriticHandle>,
    /// PPO-ptx's text; may be empty.
    pretraining: Vec<MaskedSequence>,
}

impl Algorithm for Running {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        Box::pin(self.ppo_step(run))
    }

    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(self.rollouts.evaluate(run))
    }
}

impl Running {
    async fn ppo_step(&mut self, run: &mut Run) -> Result<Step> {
        let settings = &self.settings;
        let mut seconds = Seconds::default();
        let (version, rate) = (run.version(), run.learning_rate());

        // 1. Prompts, and the policy's completions with their scores and reference log-probabilities.
        let prompts = self.rollouts.draw(run);
        let groups = self.rollouts.collect(run, &prompts, &mut seconds).await?;

        // 2. The trainer's own log-probabilities, without the sampler's filters, and the critic's values.
        let mut batch = PpoBatch::new(settings, &prompts, &groups);
        self.before_update(&mut batch, &mut seconds).await?;

        // 3. Rewards, advantages, returns.
        let kl_coef = run.state.kl_coef.unwrap_or(settings.ppo.kl_coef);
        batch.advantages(settings, kl_coef);

        // 4. Epochs of minibatches, each an update of the policy and one of the critic.
        let (policy, critic) = self.update(run, &batch, prompts.len(), rate).await?;

        // 5. The adaptive penalty, and the numbers of the step.
        let kl = mean(groups.iter().flat_map(|g| &g.completions).map(log_ratio));
        if let Some(adaptive) = &settings.ppo.adaptive {
            run.state.kl_coef = Some(adaptive.update(kl_coef, kl, batch.0.len()));
        }
        seconds.critic += critic.seconds();
        let mut stats = rollout_stats(&groups);
        stats.extend(batch.stats(kl_coef));
        stats.extend(critic.stats());
        if critic.count() > 0 {
            stats.insert("value_loss", critic.loss());
        }
        stats.insert("minibatches", policy.count() as f64);
        let summary = policy.summary(stats, seconds, rate, version);
        Ok(settings.online.step(summary, &groups, prompts.len()))
    }

    /// Log-probabilities under the policy and values of the critic, before anything changes.
    async fn before_update(&self, batch: &mut PpoBatch, seconds: &mut Seconds) -> Result<()> {
        let start = Instant::now();
        let Ppo { online, ppo, .. } = &self.settings;
        let old = match ppo.off_policy {
            OffPolicy::Sampler if online.rollout.ahead > 0 => batch.sampled(),
            _ => self.rollouts.policy.logprobs(batch.tokens(), online.rollout.temperature()).await?,
        };
        seconds.policy += start.elapsed().as_secs_f64();
        let start = Instant::now();
        let values = match &self.critic {
            Some(critic) => critic.values(batch.valued()).await?,
            None => vec![Vec::new(); batch.0.len()],
        };
        seconds.critic += start.elapsed().as_secs_f64();
        batch.set(old, values)?;
        if ppo.off_policy == OffPolicy::Decoupled {
            batch.weigh(&ppo.importance);
        }
        Ok(())
    }

    /// Updates of the policy and of the critic, until the policy has moved too far.
    async fn update(&self, run: &mut Run, batch: &PpoBatch, prompts: usize, rate: f64) -> Result<(Updates, Updates)> {
        let (mut policy, mut critic) = (Updates::default(), Updates::default());
        let Ppo { online, ppo, update, critic: critic_settings, .. } = &self.settings;
        let mut parts = minibatches(run.common.job.seed, run.state.step, batch.0.len(), *update);
        if run.common.optimizer.leaves > 1 {
            // In the order of prompts, so that leaves are ranges of them.
            parts.iter_mut().for_each(|part| part.sort_unstable());
        }
        for (index, part) in parts.iter().enumerate() {
            // A step of one minibatch is cut by prompts: members learn from what they sampled. Parts of minibatches are equal.
            let cut = match update.minibatches {
                1 => Cut::Prompts { prompts, of: part.iter().map(|&i| batch.0[i].prompt).collect() },
                _ => Cut::Items,
            };
            let of = |s: &PpoSample| RolloutTokens {
                tokens: s.tokens.clone(),
                old_logprobs: narrow(&s.old),
                advantages: narrow(&s.advantages),
                ref_logprobs: narrow(&s.reference),
                weights: narrow(&s.weights),
            };
            let objective = PolicyObjective {
                rollouts: part.iter().map(|&i| of(&batch.0[i])).collect(),
                loss: ppo.loss,
                pretraining: self.pretraining(run, parts.len(), index),
                cut: cut.clone(),
            };
            let report = run.learn(objective, rate, online.rollout.temperature()).await?;
            let moved = report.stats.get("approx_kl").copied().unwrap_or(0.0);
            policy.add(report);
            if let Some(handle) = &self.critic {
                let of = |s: &PpoSample| ValueTokens {
                    tokens: s.valued.clone(),
                    old_values: narrow(&s.values),
                    returns: narrow(&s.returns),
                };
                let rollouts = part.iter().map(|&i| of(&batch.0[i])).collect();
                let objective = Values { rollouts, clip: ppo.value_clip, cut };
                // The critic's schedule is the policy's, scaled to its own peak.
                let peak = run.common.optimizer.learning_rate;
                let learning_rate = rate * critic_settings.learning_rate.unwrap_or(peak) / peak;
                critic.add(run.learn_critic(handle, objective, learning_rate).await?);
            }
            if ppo.stop_kl.is_some_and(|limit| moved > limit) {
                break;
            }
        }
        Ok((policy, critic))
    }

    /// The pretraining rows of a minibatch, and their weight.
    fn pretraining(&self, run: &Run, minibatches: usize, index: usize) -> Option<(Demonstrations, f64)> {
        let (ppo, rows) = (&self.settings.ppo, &self.pretraining);
        if rows.is_empty() || ppo.pretraining_weight == 0.0 {
            return None;
        }
        let n = ppo.pretraining_rows;
        let cursor = (run.state.step * minibatches as u64 + index as u64) * n as u64;
        let drawn = order(run.common.job.seed, cursor, n, rows.len());
        let sequences = drawn.into_iter().map(|i| rows[i].clone()).collect();
        Some((Demonstrations { sequences, reduction: NllReduction::TokenMean }, ppo.pretraining_weight))
    }
}
