//! The roles of a job as actors behind typed handles: policy, reference, reward, critic, buffer, archivist, director.
//!
//! This is the only crate that depends on ractor. Each role is a synchronous state machine on its own OS thread, which
//! owns the role's device state; an actor forwards messages to it. A refused request is an error in the reply. Only a
//! panic ends a role, and the director then restarts it.
//!
//! A training step minimizes an [`Objective`], which may be one of this crate's or the caller's own.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use rehearsal_actors::{Director, RewardFn, Sample};
//! use tokio::sync::mpsc;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (events, _restarts) = mpsc::unbounded_channel();
//! let director = Director::start(3, Duration::from_secs(60), events).await?;
//! let brief = RewardFn::new("brief", |s: &Sample| Ok::<_, String>(-(s.completion.len() as f64)));
//! let reward = director.reward(Arc::new(brief)).await?;
//! let judged = reward.score(vec![Sample { completion: "Yes.".into(), ..Sample::default() }]).await?;
//! assert_eq!(judged[0].score, -4.0);
//! director.stop().await;
//! # Ok(())
//! # }
//! ```

mod archivist;
mod buffer;
mod device;
mod director;
mod error;
mod files;
mod frozen;
mod micro_batch;
mod models;
mod objective;
mod passes;
mod ranks;
mod reference;
mod reward;
mod reward_model;
mod role;
mod sampler;
mod snapshot;
#[cfg(test)]
mod tests;
mod trained;
mod waits;

pub use archivist::{ArchivistHandle, JobCheckpoint, Replay};
pub use buffer::{BufferHandle, Group, ScoredCompletion};
pub use device::{Devices, Placement};
pub use director::{Director, DirectorEvent, RoleStatus};
pub use error::{Error, Result};
pub use files::{Described, ModelFiles};
pub use frozen::FrozenModel;
pub use models::{CriticHandle, PolicyHandle};
pub use objective::{
    Cut, Demonstrations, Leaf, MaskedSequence, Objective, PairTokens, Pairs, Pass, Portable, Ranking, Rankings,
    RolloutTokens, Rollouts, Stats, StepTimes, ValueTokens, Values,
};
#[cfg(feature = "mpi")]
pub use ranks::MpiWire;
pub use ranks::{Ranks, Wire, launched_ranks, serve, threads_of_rank, wires};
pub use reference::ReferenceHandle;
pub use reward::{Judged, Reward, RewardError, RewardFn, RewardHandle, Sample};
pub use reward_model::{Reading, RewardModel, RewardModels, save_normalisation};
pub use role::{RoleLoad, RoleStats};
pub use sampler::{SamplerConfig, SamplerHandle};
pub use snapshot::{ModelSnapshot, Restored};
pub use trained::{LoraInit, StepReport, TrainedConfig, UpdateBatch};
pub use waits::{Wait, WaitName, Waits};

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Token ids of a prompt and a completion. Clones share them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Tokens {
    /// Token ids of the prompt.
    pub prompt: Arc<Vec<u32>>,
    /// Token ids of the completion.
    pub completion: Arc<Vec<u32>>,
}

impl Tokens {
    /// The tokens as a sequence of a model's [`Batch`](rehearsal_lm::Batch).
    pub fn sequence(&self) -> rehearsal_lm::Sequence<'_> {
        rehearsal_lm::Sequence { prompt: &self.prompt, completion: &self.completion }
    }
}
