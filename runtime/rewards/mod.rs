//! Sources of rewards: one file for each, with its settings, what it loads and its scorer.

mod encoder;
mod endpoint;
mod host;
mod judge;
mod memory;
mod models;
mod people;
mod registry;
pub mod rules;
mod scorer;
mod source;
pub mod verify;
mod weighted;

pub use encoder::{EncoderReward, EncoderSource};
pub use endpoint::EndpointSettings;
pub(crate) use host::HostScores;
pub use host::{BlockingScorerFn, HostReward, OnFailure, Scored, Scorer, ScorerFn, ScorerPolicy};
pub use judge::JudgeSource;
pub use models::RewardModelSource;
pub use people::PeopleSource;
pub use registry::sources;
pub use rules::RuleSource;
pub use scorer::ScorerSource;
pub use source::{LoadedReward, RewardContext, RewardInputs, RewardSource, StartedReward};
pub use weighted::WeightedReward;
