//! Iterative DPO (Xu et al. 2023; Yuan et al. 2024): in each round, sample K completions of each prompt, pair the best with
//! the worst, and learn from the pairs against the policy that sampled them.

use std::any::Any;

use super::shared::rounds::{RoundSettings, round};
use crate::config::{Keys, Settings};
use crate::driver::{
    Algorithm, AlgorithmSettings, LoadedAlgorithm, Loader, RolloutInputs, Rollouts, Run, Starter, Step,
};
use crate::error::Result;
use crate::futures::BoxFuture;
use crate::settings::Common;
use crate::summary::Evaluation;

/// Settings of `iterative_dpo`: `[prompts]`, `[rollout]`, `[loss]`, `[update]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct IterativeDpo {
    pub rounds: RoundSettings,
}

impl Settings for IterativeDpo {
    fn visit(&mut self, keys: &mut Keys) {
        self.rounds.online.visit(keys);
        self.rounds.loss.visit(keys);
        self.rounds.update.visit(keys);
    }
}

impl AlgorithmSettings for IterativeDpo {
    fn check(&self, common: &Common, keys: &mut Keys) {
        self.rounds.online.rollout.check(common, keys);
        self.rounds.online.rollout.check_compared(keys, "`iterative_dpo` needs");
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        let inputs = self.rounds.online.load(loader, false)?;
        loader.rewards()?;
        Ok(Box::new(Loaded { settings: self.clone(), inputs }))
    }

    fn boxed(&self) -> Box<dyn AlgorithmSettings> {
        Box::new(self.clone())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

struct Loaded {
    settings: IterativeDpo,
    inputs: RolloutInputs,
}

impl LoadedAlgorithm for Loaded {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            let rollouts = Rollouts::start(self.inputs, starter).await?;
            Ok(Box::new(Running { settings: self.settings, rollouts }) as _)
        })
    }
}

struct Running {
    settings: IterativeDpo,
    rollouts: Rollouts,
}

impl Algorithm for Running {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        let rounds = &self.settings.rounds;
        Box::pin(round(run, &self.rollouts, rounds, |_, group| rounds.loss.best_and_worst(group).into_iter().collect()))
    }

    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(self.rollouts.evaluate(run))
    }
}
