//! Objectives as pure functions beside their equations, evaluation metrics, the optimizer and its schedules.
//!
//! This crate knows no model, actor, store, clock or log. Objectives take tensors and a small configuration and return a
//! loss and its statistics; they know no device and draw no random numbers. The [optimizer](adamw) alone runs device
//! code, on the CPU or a [GPU backend](rehearsal_kernels::gpu), and rounds 8- and 16-bit moments stochastically, by random
//! bits that are a function of the step and the element's index.

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

pub use adamw::{AdamRule, AdamW, AdamWConfig, MomentType, clip_scale, global_norm};
pub use kl::{AdaptiveKl, KlEstimator};
pub use pairs::{Pair, TieRule, select_pair};
pub use preference::{PreferenceConfig, PreferenceKind, PreferenceLogprobs, PreferenceLoss, preference_loss};
pub use schedule::{Schedule, ScheduleKind};
pub use sft::NllReduction;

/// Totals of a batch, which the loss of each of its micro-batches is divided by, so that these add up to the loss of
/// the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchTotals {
    /// Sequences, or pairs of them, in the batch.
    pub sequences: usize,
    /// Tokens in the loss, of the whole batch.
    pub tokens: usize,
}

/// Errors of objectives, evaluation and the optimizer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{name}` = {value} must be {range}")]
    OutOfRange { name: &'static str, value: f64, range: &'static str },
    #[error("parameter `{0}` has no gradient; every trained parameter must be part of the loss")]
    NoGradient(String),
    #[error("gradient `{0}` belongs to no trained parameter; pass the gradients of the optimiser's own variables")]
    StrayGradient(String),
    #[error("ratings: {0}")]
    Ratings(String),
    #[error("the loss needs {0}")]
    Missing(&'static str),
    #[error("optimizer state does not fit: {0}")]
    Moments(String),
    #[error("{what}: {wanted} values are needed, but there are {found}")]
    Length { what: &'static str, found: usize, wanted: usize },
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
