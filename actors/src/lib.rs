//! The roles of a job as actors behind typed handles: policy, reference, reward, critic, buffer, archivist, director.
//!
//! This crate alone knows ractor. Behind every handle is a synchronous state machine on a thread of its own, which
//! owns the device's state; the actor in front of it only carries messages. A refused request is a reply; only a
//! panic or a lost device ends a role, and the director then starts it again.

mod archivist;
mod buffer;
mod device;
mod director;
mod error;
mod frozen;
mod micro_batch;
mod models;
mod objective;
mod passes;
mod reference;
mod reward;
mod reward_model;
mod role;
mod snapshot;
#[cfg(test)]
mod tests;
mod trained;

pub use archivist::{ArchivistHandle, JobCheckpoint, Replay};
pub use buffer::{BufferHandle, Group, ScoredCompletion};
pub use device::{Devices, Placement};
pub use director::{Director, DirectorEvent, RoleStatus};
pub use error::{Error, Result};
pub use frozen::FrozenModel;
pub use models::{CriticHandle, PolicyHandle};
pub use objective::{
    Demonstrations, Marked, Objective, PairTokens, Pairs, Pass, Ranking, Rankings, RolloutTokens, Rollouts, Stats,
    StepTimes, ValueTokens, Values,
};
pub use reference::ReferenceHandle;
pub use reward::{Judged, Reward, RewardError, RewardFn, RewardHandle, Sample};
pub use reward_model::{RewardModel, RewardModels, keep_normalisation};
pub use role::RoleStats;
pub use snapshot::{ModelSnapshot, Restored};
pub use trained::{LoraStart, StepReport, TrainedConfig, UpdateBatch};

use std::sync::Arc;

/// Tokens of a prompt and a completion; cloning shares them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tokens {
    pub prompt: Arc<Vec<u32>>,
    pub completion: Arc<Vec<u32>>,
}

impl Tokens {
    /// The tokens as the model's batches take them.
    pub fn sequence(&self) -> rehearsal_lm::Sequence<'_> {
        rehearsal_lm::Sequence { prompt: &self.prompt, completion: &self.completion }
    }
}
