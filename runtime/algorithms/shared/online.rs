//! What online algorithms share: their sections, and the summary of a step.

use rehearsal_actors::Group;

use crate::config::{Keys, Settings};
use crate::data::PromptsSettings;
use crate::driver::{Loader, RolloutInputs, RolloutSettings, Step, generated_tokens};
use crate::error::Result;
use crate::summary::StepSummary;

/// Sections of an algorithm that learns from the policy's own completions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OnlineSettings {
    /// What the policy is asked: `[prompts]`.
    pub prompts: PromptsSettings,
    /// How completions are sampled: `[rollout]`.
    pub rollout: RolloutSettings,
}

impl Settings for OnlineSettings {
    fn visit(&mut self, keys: &mut Keys) {
        self.prompts.visit(keys);
        self.rollout.visit(keys);
    }
}

impl OnlineSettings {
    /// Loads prompts and reference. `updates_generator`: the first update uses the weights that generated.
    pub fn load(&self, loader: &mut Loader<'_>, updates_generator: bool) -> Result<RolloutInputs> {
        Ok(RolloutInputs {
            settings: self.rollout.clone(),
            policy: loader.policy(),
            reference: loader.reference()?,
            prompts: loader.prompts(&self.prompts, self.rollout.max_new_tokens)?,
            updates_generator,
        })
    }

    /// A step with its counts.
    pub fn step(&self, summary: StepSummary, groups: &[Group], prompts: usize) -> Step {
        let generated_tokens = generated_tokens(groups);
        let completions = if generated_tokens > 0 { self.rollout.completions_per_step() } else { 0 };
        Step { summary: StepSummary { generated_tokens, ..summary }, drawn: prompts, completions }
    }
}
