//! From prompts to scored completions.

mod collect;
mod completion;
mod evaluation;
mod overlap;
mod preferences;
mod settings;
mod stats;

pub use collect::{RolloutInputs, Rollouts};
pub use settings::{RolloutSettings, recorded_tokens};
pub use stats::{generated_tokens, log_ratio, rollout_stats};
