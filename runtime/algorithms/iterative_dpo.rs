//! Iterative DPO (Xu et al. 2023; Yuan et al. 2024): in each round, sample K completions of each prompt, pair the best with
//! the worst, and learn from the pairs against the policy that sampled them.

use rehearsal_actors::Group;
use rehearsal_learn::pairs::Pair;

use super::shared::rounds::{self, InRounds, RoundSettings};
use crate::config::{Keys, Settings};
use crate::data::PromptsSettings;
use crate::driver::{AlgorithmSettings, LoadedAlgorithm, Loader, Run};
use crate::error::Result;
use crate::settings::Common;

/// Settings of `iterative_dpo`: `[prompts]`, `[rollout]`, `[loss]`, `[update]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct IterativeDpo {
    /// Sections of every algorithm that learns in rounds.
    pub rounds: RoundSettings,
}

impl Settings for IterativeDpo {
    fn visit(&mut self, keys: &mut Keys) {
        self.rounds.visit(keys);
    }
}

impl AlgorithmSettings for IterativeDpo {
    fn prompts(&self) -> Option<&PromptsSettings> {
        Some(&self.rounds.online.prompts)
    }

    fn check(&self, common: &Common, keys: &mut Keys) {
        self.rounds.online.rollout.check(common, keys);
        self.rounds.online.rollout.check_compared(keys, "`iterative_dpo` needs");
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        rounds::load(self, loader)
    }
}

impl InRounds for IterativeDpo {
    fn rounds(&self) -> &RoundSettings {
        &self.rounds
    }

    fn pairs(&self, _: &Run, group: &Group) -> Vec<Pair> {
        self.rounds.loss.best_and_worst(group).into_iter().collect()
    }
}
