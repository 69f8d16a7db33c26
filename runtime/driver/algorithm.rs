//! What an algorithm is: settings, loading, roles, steps.

use std::any::Any;
use std::fmt::Debug;

use dyn_clone::DynClone;
use rehearsal_learn::reward::Normalisation;
use rehearsal_lm::Architecture;

use super::loader::Loader;
use super::run::Run;
use super::starter::Starter;
use super::stats::Step;
use crate::config::{Keys, Settings};
use crate::data::PromptsSettings;
use crate::error::Result;
use crate::futures::BoxFuture;
use crate::memory::MemoryBudget;
use crate::metrics::Metric;
use crate::settings::Common;
use crate::summary::Evaluation;

/// The settings of an algorithm, from which it is loaded.
///
/// A new algorithm implements this, [`LoadedAlgorithm`] and [`Algorithm`] in a file of its own and is named in one line
/// of the registry.
pub trait AlgorithmSettings: Settings + Any + DynClone + Debug + Send + Sync {
    /// Reports values that contradict those of other sections.
    fn check(&self, _common: &Common, _keys: &mut Keys) {}

    /// Whether it needs a source of rewards.
    fn needs_reward(&self) -> bool {
        false
    }

    /// Whether it trains a reward model rather than a policy.
    fn trains_reward_model(&self) -> bool {
        false
    }

    /// How prompts become tokens, if it has prompts.
    fn prompts(&self) -> Option<&PromptsSettings> {
        None
    }

    /// The memory that it is expected to take, for prompts of `prompt_tokens` tokens on average, if it says so.
    fn memory(&self, _common: &Common, _model: &Architecture, _prompt_tokens: u64) -> Option<MemoryBudget> {
        None
    }

    /// The metrics that it alone reports: a gauge for each statistic of its steps that no other algorithm has.
    fn metrics(&self) -> &'static [Metric] {
        &[]
    }

    /// Reads the models and data it needs. Blocking; nothing has been written yet.
    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>>;
}
dyn_clone::clone_trait_object!(AlgorithmSettings);

/// An algorithm whose models and data are read.
pub trait LoadedAlgorithm: Send {
    /// Starts the roles it needs.
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>>;
}

/// A running algorithm: the roles it was given, and one step. Whatever happens between steps belongs to the driver.
///
/// A step must be a function of the state, the logged completions and the configuration: after a kill it is taken again
/// from the last checkpoint.
pub trait Algorithm: Send {
    /// Evaluates on held-out prompts or rows; `None` where nothing is held out.
    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>>;

    /// Takes one step: draws data, updates the trained models, and returns what the step was like.
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>>;

    /// After the last step: what the scores of a trained reward model are normalised by, if they are.
    fn normalisation<'a>(&'a mut self, _run: &'a mut Run) -> BoxFuture<'a, Result<Option<Normalisation>>> {
        Box::pin(async { Ok(None) })
    }
}
