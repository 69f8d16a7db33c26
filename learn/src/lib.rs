//! Objectives as pure functions beside their equations, evaluation metrics, the optimizer and its schedules.
//!
//! This crate knows no model, actor, store, clock or log. Objectives take tensors and a small configuration and return a
//! loss and its statistics; they know no device and draw no random numbers. The [optimizer](adamw) alone runs device
//! code, on the CPU or a [GPU backend](rehearsal_kernels::gpu), and rounds 8- and 16-bit moments stochastically, by random
//! bits that are a function of the step and the element's index.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use rehearsal_learn::{PreferenceConfig, PreferenceLogprobs, preference_loss};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // One pair: log-probabilities of its completions under policy and reference, `[pairs]`.
//! let pair = |x: f64| Tensor::new(&[x], &Device::Cpu);
//! let loss = preference_loss(
//!     &PreferenceLogprobs {
//!         policy_chosen: &pair(-8.0)?,
//!         policy_rejected: &pair(-13.0)?,
//!         ref_chosen: &pair(-10.0)?,
//!         ref_rejected: &pair(-12.0)?,
//!         chosen_tokens: &pair(20.0)?,
//!         rejected_tokens: &pair(25.0)?,
//!         score_gap: None,
//!     },
//!     &PreferenceConfig { beta: 0.1, ..PreferenceConfig::default() },
//! )?;
//! // β ((-8 + 10) - (-13 + 12))
//! assert!((loss.margins()?.to_vec1::<f64>()?[0] - 0.3).abs() < 1e-12);
//! # Ok(())
//! # }
//! ```

pub mod adamw;
pub mod ema;
pub mod evaluation;
pub mod group;
pub mod importance;
pub mod kl;
pub mod pairs;
pub mod ppo;
pub mod preference;
pub mod reward;
pub mod rso;
pub mod schedule;
pub mod sft;
pub mod token;

pub use adamw::{AdamRule, AdamW, AdamWConfig, MomentType, clip_scale, global_norm, global_norm_on};
pub use importance::{ImportanceConfig, importance_weights};
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
    /// A setting is out of its range.
    #[error("`{name}` = {value} must be {range}")]
    OutOfRange {
        /// Name of the setting.
        name: &'static str,
        /// Its value.
        value: f64,
        /// Its range, in words.
        range: &'static str,
    },
    /// A trained parameter has no gradient.
    #[error("parameter `{0}` has no gradient; every trained parameter must be part of the loss")]
    NoGradient(String),
    /// A gradient belongs to no trained parameter.
    #[error("gradient `{0}` belongs to no trained parameter; pass the gradients of the optimiser's own variables")]
    StrayGradient(String),
    /// Games that cannot be rated.
    #[error("ratings: {0}")]
    Ratings(String),
    /// An input that the loss needs is not there.
    #[error("the loss needs {0}")]
    Missing(&'static str),
    /// Optimizer state of other parameters or of another type.
    #[error("optimizer state does not fit: {0}")]
    Moments(String),
    /// A slice has the wrong length.
    #[error("{what}: {wanted} values are needed, but there are {found}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Its length.
        found: usize,
        /// Length that is needed.
        wanted: usize,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
