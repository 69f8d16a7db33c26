//! Objectives as pure functions beside their equations, the optimiser and its schedules.
//!
//! This crate knows no model, actor, store, clock, random number or log: tensors and a small configuration in,
//! a loss and its statistics out.

pub mod adamw;
pub mod ema;
pub mod evaluation;
pub mod group;
pub mod kl;
pub mod pairs;
pub mod ppo;
pub mod preference;
pub mod reward;
pub mod rso;
pub mod schedule;
pub mod sft;
pub mod token;
mod wide;

pub use adamw::{ADAMW_CUDA, AdamRule, AdamW, AdamWConfig, MomentType, clip_scale, global_norm};
pub use kl::{AdaptiveKl, KlEstimator};
pub use pairs::{Pair, TieRule, select_pair};
pub use preference::{PreferenceConfig, PreferenceKind, PreferenceLogprobs, PreferenceLoss, preference_loss};
pub use schedule::{Schedule, ScheduleKind};
pub use sft::NllReduction;

/// How much the batch holds that a micro-batch is a part of: shares of a loss are divided by this, so that they add up
/// to the loss of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whole {
    /// Sequences, or pairs of them.
    pub sequences: usize,
    /// Tokens that are learned from.
    pub tokens: usize,
}

/// What can go wrong in an objective or the optimiser.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{name}` = {value} must be {range}")]
    OutOfRange { name: &'static str, value: f64, range: &'static str },
    #[error("parameter `{0}` has no gradient; every trained parameter must be part of the loss")]
    NoGradient(String),
    #[error("there is a gradient for `{0}`, which is not a trained parameter")]
    StrayGradient(String),
    #[error("ratings: {0}")]
    Ratings(String),
    #[error("the loss needs {0}")]
    Missing(&'static str),
    #[error("the optimiser's moments do not fit: {0}")]
    Moments(String),
    #[error("{what}: {found} values, but {wanted} are needed")]
    Length { what: &'static str, found: usize, wanted: usize },
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
