//! Online DPO (Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback"): the policy answers each prompt
//! K times, a source of rewards scores the completions, the best and the worst of them enter a preference loss against the
//! reference, and the next completions come from the updated policy.

use rehearsal_actors::{Cut, PairTokens, Pairs};
use rehearsal_learn::pairs::Pair;
use rehearsal_lm::Architecture;

use super::shared::online::OnlineSettings;
use super::shared::pairs::{pair_stats, pair_tokens};
use super::shared::preference::LossSettings;
use crate::config::{Keys, Settings};
use crate::data::PromptsSettings;
use crate::driver::{
    Algorithm, AlgorithmSettings, LoadedAlgorithm, Loader, RolloutInputs, Rollouts, Run, Starter, Step, Updates,
    rollout_stats,
};
use crate::error::Result;
use crate::futures::BoxFuture;
use crate::memory::MemoryBudget;
use crate::settings::Common;
use crate::summary::{Evaluation, Seconds};

/// Settings of `online_dpo`: `[prompts]`, `[rollout]`, `[loss]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OnlineDpo {
    /// Sections of every online algorithm.
    pub online: OnlineSettings,
    /// Loss and β: `[loss]`.
    pub loss: LossSettings,
}

impl Settings for OnlineDpo {
    fn visit(&mut self, keys: &mut Keys) {
        self.online.visit(keys);
        self.loss.visit(keys);
    }
}

impl AlgorithmSettings for OnlineDpo {
    fn prompts(&self) -> Option<&PromptsSettings> {
        Some(&self.online.prompts)
    }

    fn check(&self, common: &Common, keys: &mut Keys) {
        self.online.rollout.check(common, keys);
        self.online.rollout.check_compared(keys, "`online_dpo` needs");
    }

    fn memory(&self, common: &Common, model: &Architecture, prompt_tokens: u64) -> Option<MemoryBudget> {
        MemoryBudget::predict(common, &self.online.rollout, model, prompt_tokens)
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        let inputs = self.online.load(loader, true)?;
        loader.rewards()?;
        Ok(Box::new(Loaded { settings: self.clone(), inputs }))
    }
}

struct Loaded {
    settings: OnlineDpo,
    inputs: RolloutInputs,
}

impl LoadedAlgorithm for Loaded {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            let model = &starter.model.architecture;
            starter.expect_memory(self.settings.memory(starter.common, model, starter.prompt_tokens));
            let rollouts = Rollouts::start(self.inputs, starter).await?;
            Ok(Box::new(Running { settings: self.settings, rollouts }) as _)
        })
    }
}

struct Running {
    settings: OnlineDpo,
    rollouts: Rollouts,
}

impl Algorithm for Running {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        Box::pin(async move {
            let OnlineDpo { online, loss } = &self.settings;
            let mut seconds = Seconds::default();
            let (version, learning_rate) = (run.version(), run.learning_rate());

            // 1. Prompts, and the policy's completions with their scores and reference log-probabilities.
            let prompts = self.rollouts.draw(run);
            let groups = self.rollouts.collect(run, &prompts, &mut seconds).await?;

            // 2. The best and the worst completion of each prompt; every comparison goes into the ledger.
            let pairs: Vec<Option<Pair>> = groups.iter().map(|g| loss.best_and_worst(g)).collect();
            self.rollouts.log_preferences(run, &prompts, &groups, pairs.iter().copied()).await?;

            // 3. One update on the pairs. When all prompts tie there is nothing to learn.
            let tokens: Vec<PairTokens> =
                groups.iter().zip(&pairs).filter_map(|(g, p)| Some(pair_tokens(&prompts, g, (*p)?))).collect();
            let mut updates = Updates::default();
            if !tokens.is_empty() {
                let of = groups.iter().zip(&pairs).filter(|(_, pair)| pair.is_some()).map(|(group, _)| group.prompt);
                let cut = Cut::Prompts { prompts: prompts.len(), of: of.collect() };
                let objective = Pairs { pairs: tokens, loss: loss.preference, cut };
                updates.add(run.learn(objective, learning_rate, online.rollout.temperature()).await?);
            }

            let mut stats = rollout_stats(&groups);
            stats.extend(pair_stats(&pairs));
            let summary = updates.summary(stats, seconds, learning_rate, version);
            Ok(online.step(summary, &groups, prompts.len()))
        })
    }

    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(self.rollouts.evaluate(run))
    }
}
