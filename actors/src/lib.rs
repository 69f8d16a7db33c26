//! The roles of a job as actors behind typed handles: policy, reference, reward, buffer, archivist, director.
//!
//! This crate alone knows ractor. Behind every handle is a synchronous state machine on a thread of its own, which
//! owns the device's state; the actor in front of it only carries messages. A refused request is a reply; only a
//! panic or a lost device ends a role, and the director then starts it again.

mod archivist;
mod buffer;
mod device;
mod director;
mod error;
mod policy;
mod reference;
mod reward;
mod role;
#[cfg(test)]
mod tests;

pub use archivist::{ArchivistHandle, JobCheckpoint, Replay, Restored};
pub use buffer::{BufferHandle, Group, ScoredCompletion};
pub use device::{Devices, Placement};
pub use director::{Director, DirectorEvent, RoleStatus};
pub use error::{Error, Result};
pub use policy::{PairTokens, PolicyConfig, PolicyHandle, PolicySnapshot, StepReport, StepTimes, UpdateBatch};
pub use reference::ReferenceHandle;
pub use reward::{Judged, Reward, RewardError, RewardFn, RewardHandle, Sample};
pub use role::RoleStats;

use std::sync::Arc;

/// Tokens of a prompt and a completion; cloning shares them.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokens {
    pub prompt: Arc<Vec<u32>>,
    pub completion: Arc<Vec<u32>>,
}

impl Tokens {
    fn sequence(&self) -> rehearsal_lm::Sequence<'_> {
        rehearsal_lm::Sequence { prompt: &self.prompt, completion: &self.completion }
    }
}
