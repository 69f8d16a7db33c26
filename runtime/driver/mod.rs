//! What every algorithm has in common: the loop around its steps, and the verbs that steps are made of.

mod algorithm;
mod checkpoints;
mod command;
mod drive;
mod interval;
mod journal;
mod loader;
mod roles;
mod rollouts;
mod run;
mod start;
mod starter;
mod state;
mod stats;
mod waits;

pub use algorithm::{Algorithm, AlgorithmSettings, LoadedAlgorithm};
pub(crate) use command::{Command, CommandReply};
pub use drive::MODEL_FOLDER;
pub(crate) use drive::drive;
pub use loader::{Loaded, Loader};
pub(crate) use roles::Roles;
pub use rollouts::{
    RolloutInputs, RolloutSettings, Rollouts, generated_tokens, log_ratio, recorded_tokens, rollout_stats,
};
pub use run::Run;
pub(crate) use start::{Setup, start};
pub use starter::Starter;
pub use state::JobState;
pub use stats::{Stats, Step, Updates, mean};
pub(crate) use waits::watch_waits;
