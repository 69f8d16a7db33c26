//! Generation ahead of learning (`rollout.ahead` = η): while step s is learned, completions of steps up to s + η are generated.
//!
//! The completions of step s are those of the policy as it was before step max(0, s - η), however fast anything is. So the
//! schedule is part of the algorithm: a job repeats itself and resumes to the bit, and a checkpoint holds the weights of the
//! steps before it that are still to generate.

use std::sync::Arc;

use rehearsal_actors::{ModelSnapshot, Placement, SamplerHandle};

use super::collector::{Collector, Context, Source};
use super::completion::Collected;
use super::schedule::{Collecting, Schedule};
use crate::data::PromptRow;
use crate::driver::run::Run;
use crate::error::{Error, Result};

/// What generates ahead.
pub struct Ahead {
    pub schedule: Arc<Schedule>,
    pub sampler: SamplerHandle,
    /// Device that generation shares with other roles; `None` if it has threads of its own.
    pub occupied: Option<Placement>,
}

impl Ahead {
    /// Completions of the current step, and the version that sampled them. Begins to collect the steps that the schedule names.
    /// `draw` gives the prompts of a step, by how many steps it is ahead.
    pub async fn collect(
        &self,
        run: &Run,
        collector: &Collector,
        draw: impl Fn(u64) -> Vec<PromptRow>,
        prompts: &[PromptRow],
    ) -> Result<(u64, Collected)> {
        let (step, schedule) = (run.state.step, &self.schedule);
        let is_there = schedule.state().weights.contains_key(&step);
        if !is_there {
            let weights = Arc::new(collector.policy.weights().await?);
            schedule.state().weights.insert(step, weights);
        }
        let collecting = {
            let mut state = schedule.state();
            state.weights.retain(|at, _| *at >= schedule.sampled_by(step));
            for later in step..(step + schedule.ahead + 1).min(run.common.job.steps.max(step + 1)) {
                if !state.collecting.contains_key(&later) {
                    let by = schedule.sampled_by(later);
                    let missing = || Error::Internal(format!("step {later} has no weights of step {by}"));
                    let weights = state.weights.get(&by).cloned().ok_or_else(missing)?;
                    state.collecting.insert(later, self.begin(run, collector, later, draw(later - step), weights));
                }
            }
            state.collecting.remove(&step)
        };
        let lost = || Error::Internal(format!("nothing collects step {step}"));
        let Collecting { prompts: scheduled, version, result, _cancel } = collecting.ok_or_else(lost)?;
        if scheduled != prompts {
            let message = "with `rollout.ahead`, the prompts of a step must be those of `Rollouts::draw`";
            return Err(Error::Internal(message.into()));
        }
        let collected = result.await.map_err(|e| Error::Internal(format!("collecting step {step}: {e}")))??;
        Ok((version, collected))
    }

    fn begin(
        &self,
        run: &Run,
        collector: &Collector,
        step: u64,
        prompts: Vec<PromptRow>,
        weights: Arc<ModelSnapshot>,
    ) -> Collecting {
        let version = weights.version;
        let cancel = run.cancel.child_token();
        let context = Context {
            step,
            policy_version: version,
            source: Source::Sampler(self.sampler.clone(), weights),
            cancel: cancel.clone(),
            occupied: self.occupied,
            ..Context::of(run)
        };
        let (collector, of) = (collector.clone(), prompts.clone());
        let result = tokio::spawn(async move { collector.collect(&context, &of).await });
        Collecting { prompts, version, result, _cancel: cancel.drop_guard() }
    }
}
