//! Which steps are generated ahead of learning, and with which weights.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rehearsal_actors::ModelSnapshot;
use tokio::task::JoinHandle;
use tokio_util::sync::DropGuard;

use super::completion::Collected;
use crate::data::PromptRow;
use crate::error::Result;

/// Role of the weights of earlier steps in checkpoints, with their age in steps behind it.
const OLDER: &str = "policy-";

/// The schedule of generation `ahead` steps ahead of learning: step s is sampled by the policy as it was before step
/// max(0, s - ahead).
pub struct Schedule {
    pub ahead: u64,
    state: Mutex<State>,
}

/// Where a job is in its schedule.
#[derive(Default)]
pub struct State {
    /// The policy's weights before each step that has yet to generate by them.
    pub weights: BTreeMap<u64, Arc<ModelSnapshot>>,
    /// Steps that are being collected, or that are waiting to be learned from.
    pub collecting: BTreeMap<u64, Collecting>,
}

/// A step that is collected in the background; dropping it ends that.
pub struct Collecting {
    pub prompts: Vec<PromptRow>,
    /// Version of the weights that sample it.
    pub version: u64,
    pub result: JoinHandle<Result<Collected>>,
    pub _cancel: DropGuard,
}

impl Schedule {
    pub fn new(ahead: u64) -> Self {
        Self { ahead, state: Mutex::default() }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The step whose weights sample a step.
    pub fn sampled_by(&self, step: u64) -> u64 {
        step.saturating_sub(self.ahead)
    }

    /// The weights that steps from `step` on need beside the policy's own, by their roles in a checkpoint.
    pub fn older_weights(&self, step: u64) -> Vec<(String, ModelSnapshot)> {
        let state = self.state();
        let needed = state.weights.range(self.sampled_by(step)..step);
        needed.map(|(at, weights)| (format!("{OLDER}{}", step - at), (**weights).clone())).collect()
    }

    /// Returns to a checkpoint's step and the weights that it holds: what is collected is dropped, and collected again.
    pub fn restore(&self, step: u64, models: &mut BTreeMap<String, ModelSnapshot>) {
        let mut state = State::default();
        for age in 1..=self.ahead.min(step) {
            if let Some(weights) = models.remove(&format!("{OLDER}{age}")) {
                state.weights.insert(step - age, Arc::new(weights));
            }
        }
        *self.state() = state;
    }
}
