//! From prompts to scored completions, as algorithms ask for them.

use std::sync::Arc;

use rehearsal_actors::{BufferHandle, Group, PolicyHandle, ReferenceHandle, RewardHandle};
use rehearsal_lm::Checkpoint;

use super::ahead::Ahead;
use super::collector::{Collector, Context};
use super::completion::Collected;
use super::settings::{RolloutSettings, recorded_tokens};
use crate::data::{PromptRow, Prompts};
use crate::driver::run::Run;
use crate::driver::starter::Starter;
use crate::error::Result;
use crate::summary::Seconds;

/// What an online algorithm reads before it starts.
pub struct RolloutInputs {
    /// How completions are sampled.
    pub settings: RolloutSettings,
    /// Prompts of the job.
    pub prompts: Prompts,
    /// The start of the policy.
    pub policy: Arc<Checkpoint>,
    /// The reference.
    pub reference: Arc<Checkpoint>,
    /// Whether the first update uses the weights that generated, so that their activations may be recorded.
    pub updates_generator: bool,
}

/// The roles that turn prompts into scored completions.
pub struct Rollouts {
    /// The policy, which generates.
    pub policy: PolicyHandle,
    /// The reference, which computes log-probabilities.
    pub reference: ReferenceHandle,
    /// The job's reward, which scores.
    pub reward: RewardHandle,
    buffer: BufferHandle,
    /// How completions are sampled.
    pub settings: RolloutSettings,
    /// Prompts of the job.
    pub prompts: Prompts,
    pub(super) collector: Collector,
    /// Where completions are generated ahead of learning.
    ahead: Option<Ahead>,
}

impl Rollouts {
    /// Starts policy, reference, reward and buffer, and a sampler where completions are generated ahead.
    pub async fn start(inputs: RolloutInputs, starter: &mut Starter<'_>) -> Result<Self> {
        let RolloutInputs { settings, prompts, policy: model, reference, updates_generator } = inputs;
        // What others generate leaves no activations here.
        let updates_generator = updates_generator && settings.ahead == 0 && settings.nodes.listen.is_none();
        let recorded_tokens = recorded_tokens(starter.common, updates_generator);
        let policy = starter.policy(model.clone()).await?;
        let reference = starter.reference(reference).await?;
        let reward = starter.reward().await?;
        let buffer = starter.buffer(settings.completions_per_prompt).await?;
        let ahead = match settings.ahead {
            0 => None,
            steps => {
                let (sampler, occupied) = starter.sampler(model.clone()).await?;
                Some(Ahead { schedule: starter.schedule(steps), sampler, occupied })
            }
        };
        let nodes = starter.nodes(&settings.nodes, &model)?;
        let collector = Collector {
            policy: policy.clone(),
            reference: reference.clone(),
            reward: reward.clone(),
            settings: settings.clone(),
            model,
            recorded_tokens,
            nodes,
        };
        Ok(Self { policy, reference, reward, buffer, settings, prompts, collector, ahead })
    }

    /// The prompts of the current step.
    pub fn draw(&self, run: &Run) -> Vec<PromptRow> {
        self.draw_ahead(run, 0)
    }

    /// The prompts of a step after the current one.
    fn draw_ahead(&self, run: &Run, steps: u64) -> Vec<PromptRow> {
        let (seed, n) = (run.common.job.seed, self.settings.prompts_per_step);
        let cursor = run.state.cursor + steps * n as u64;
        self.prompts.draw(seed, cursor, n).into_iter().cloned().collect()
    }

    /// Completions of the current step's prompts, scored and compared with the reference, in the order of the prompts.
    ///
    /// With `rollout.ahead`, they were sampled by the policy as it was some updates ago
    /// ([`ScoredCompletion::policy_version`](rehearsal_actors::ScoredCompletion::policy_version)), and `prompts` must be those
    /// of [`Rollouts::draw`].
    pub async fn collect(&self, run: &mut Run, prompts: &[PromptRow], seconds: &mut Seconds) -> Result<Vec<Group>> {
        let (version, collected) = match &self.ahead {
            None => (run.version(), self.collector.collect(&Context::of(run), prompts).await?),
            Some(ahead) => {
                let draw = |steps| self.draw_ahead(run, steps);
                ahead.collect(run, &self.collector, draw, prompts).await?
            }
        };
        let Collected { completions, seconds: spent } = collected;
        seconds.generate += spent.generate;
        seconds.reward += spent.reward;
        seconds.reference += spent.reference;
        for (prompt, completion) in completions {
            self.buffer.insert(prompt, completion).await?;
        }
        // What the schedule makes old is not stale.
        let (mut groups, stale) = self.buffer.take(version).await?;
        run.state.counters.stale += stale as u64;
        run.skipped = leave_out_skipped(&mut groups);
        run.staleness = self.ahead.is_some().then(|| run.version().saturating_sub(version));
        Ok(groups)
    }
}

/// Leaves completions without a score out of their groups, and groups that have none left; returns how many were left out.
fn leave_out_skipped(groups: &mut Vec<Group>) -> usize {
    let count = |groups: &[Group]| groups.iter().map(|group| group.completions.len()).sum::<usize>();
    let before = count(groups);
    groups.iter_mut().for_each(|group| group.completions.retain(|c| !c.judged.skipped));
    groups.retain(|group| !group.completions.is_empty());
    before - count(groups)
}
