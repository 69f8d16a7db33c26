//! Supervised fine-tuning: the first of InstructGPT's three steps (Ouyang et al. 2022, §3.5). The policy learns the
//! assistant's turns of demonstrations.

use std::sync::Arc;

use rehearsal_actors::{Demonstrations, MaskedSequence, PolicyHandle};
use rehearsal_learn::NllReduction;
use rehearsal_lm::Checkpoint;

use super::shared::offline::OfflineSettings;
use super::shared::preference::REDUCTIONS;
use crate::config::{Keys, Settings};
use crate::data::{PromptsSettings, Rows};
use crate::driver::{Algorithm, AlgorithmSettings, LoadedAlgorithm, Loader, Run, Starter, Stats, Step, Updates};
use crate::error::Result;
use crate::futures::BoxFuture;
use crate::settings::Common;
use crate::summary::{Evaluation, Seconds};

/// Settings of `sft`: `[data]`, `[prompts]`, `[sft]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sft {
    /// Sections of every offline algorithm.
    pub offline: OfflineSettings,
    /// How the negative log-likelihood is averaged.
    pub reduction: NllReduction,
}

impl Default for Sft {
    fn default() -> Self {
        Self { offline: OfflineSettings::default(), reduction: NllReduction::TokenMean }
    }
}

impl Settings for Sft {
    fn visit(&mut self, keys: &mut Keys) {
        self.offline.visit(keys);
        keys.section("sft").choice(
            "reduction",
            &mut self.reduction,
            &REDUCTIONS,
            "How negative log-likelihoods become a loss: mean over all tokens of the batch, mean over sequences of their means, \
             or mean over sequences of their sums.",
        );
    }
}

impl AlgorithmSettings for Sft {
    fn prompts(&self) -> Option<&PromptsSettings> {
        Some(&self.offline.prompts)
    }

    fn check(&self, _: &Common, keys: &mut Keys) {
        self.offline.check(keys, "sft");
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        let OfflineSettings { data, prompts } = &self.offline;
        let rows = loader.rows(data, prompts, |reader| reader.demonstrations())?;
        Ok(Box::new(Loaded { settings: self.clone(), policy: loader.policy(), rows }))
    }
}

struct Loaded {
    settings: Sft,
    policy: Arc<Checkpoint>,
    rows: Rows<MaskedSequence>,
}

impl LoadedAlgorithm for Loaded {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            let policy = starter.policy(self.policy).await?;
            Ok(Box::new(Running { settings: self.settings, policy, rows: self.rows }) as _)
        })
    }
}

struct Running {
    settings: Sft,
    policy: PolicyHandle,
    rows: Rows<MaskedSequence>,
}

impl Algorithm for Running {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        Box::pin(async move {
            let drawn = self.settings.offline.draw(run, &self.rows);
            let sequences = drawn.into_iter().map(|(_, row)| row.clone()).collect();
            let objective = Demonstrations { sequences, reduction: self.settings.reduction };
            let report = run.learn(objective, run.learning_rate(), 1.0).await?;
            self.settings.offline.step(run, Updates::one(report), Stats::new(), Seconds::default())
        })
    }

    /// The negative log-likelihood of a token of the held-out demonstrations.
    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(async move {
            let held_out = &self.rows.held_out;
            if held_out.is_empty() {
                return Ok(None);
            }
            let tokens: usize = held_out.iter().map(MaskedSequence::loss_tokens).sum();
            let sums = self.policy.likelihoods(held_out.clone()).await?;
            let loss = -sums.iter().sum::<f64>() / tokens.max(1) as f64;
            Ok(Some(Evaluation::of_rows(run.state.step, [("loss", loss)])))
        })
    }
}
